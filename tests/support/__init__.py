"""What tests share: models to run (`zoo`), one builder of engines, one comparison of logits, one way to run the command.

Nothing here is collected as a test.
"""
