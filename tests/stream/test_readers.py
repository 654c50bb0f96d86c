"""The consumer sleeps until all that it waits for has arrived."""

import threading

from headrace.stream.readers import ReadCounters, Readers


def test_the_first_error_of_several_readers_is_kept() -> None:
    readers = Readers(2, name="test", counters=ReadCounters(), spans=None)
    first, second = OSError("the cause"), OSError("what followed")
    for error in (first, second):

        def fail(error: OSError = error) -> bool:
            raise error

        readers._work(fail)
    assert readers.error is first


def test_the_consumer_is_woken_once_and_only_when_all_has_arrived() -> None:
    readers = Readers(1, name="test", counters=ReadCounters(), spans=None)
    notify, woken = readers.data_ready.notify, []
    readers.data_ready.notify = lambda n=1: (woken.append(len(arrived)), notify(n))[1]  # type: ignore[method-assign]
    arrived: list[int] = []
    asleep = threading.Event()

    def ready() -> bool:
        asleep.set()
        return len(arrived) == 3

    consumer = threading.Thread(target=readers.wait, args=(ready, "three"))
    consumer.start()
    asleep.wait()
    for number in range(3):
        with readers.data_ready:
            arrived.append(number)
            readers.notify_if_ready()
    consumer.join(timeout=10)
    assert not consumer.is_alive()
    assert woken == [3]
    with readers.data_ready:
        readers.notify_if_ready()  # nobody waits
    assert woken == [3]
