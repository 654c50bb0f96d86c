"""Flows through pipes: common pipes are shared, and the busiest is the bottleneck."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.forecast.topology import Flow, Pipe, Topology

PROPERTY = settings(max_examples=100, deadline=None)
GB = 1e9
NAMES = ("disk", "dram", "bus")
RATES = st.fixed_dictionaries({name: st.floats(1.0, 1e3) for name in NAMES})
FLOWS = st.lists(
    st.builds(Flow, nbytes=st.floats(0, 1e4), route=st.lists(st.sampled_from(NAMES), max_size=4).map(tuple)),
    max_size=6,
)


def topology(rates: dict[str, float]) -> Topology:
    return Topology([Pipe(name, rate) for name, rate in rates.items()])


def test_two_flows_through_a_common_pipe_take_as_long_as_their_sum() -> None:
    pipes = topology({"root": 10.0, "left": 100.0, "right": 100.0})
    one, other = Flow(30, ("root", "left")), Flow(50, ("root", "right"))

    assert pipes.load([one, other]).seconds == pytest.approx(8)
    assert pipes.load([one, other]).binding == "root"


def test_two_flows_through_pipes_of_their_own_take_as_long_as_the_longer() -> None:
    pipes = topology({"left": 10.0, "right": 10.0})
    assert pipes.load([Flow(30, ("left",)), Flow(50, ("right",))]).seconds == pytest.approx(5)


def test_a_pipe_that_is_crossed_twice_counts_twice() -> None:
    pipes = topology({"disk": 10.0, "dram": 12.0})
    load = pipes.load([Flow(60, ("disk", "dram", "dram"))])

    assert load.binding == "dram"
    assert load.seconds == pytest.approx(10)
    assert load.utilisation == pytest.approx({"disk": 0.6, "dram": 1.0})


def test_eight_links_wait_for_eight_channels_of_memory() -> None:
    links = [f"link {number}" for number in range(8)]
    pipes = topology({"dram": 204.8 * GB, **dict.fromkeys(links, 31.5 * GB)})
    load = pipes.load([Flow(252 * GB / 8, ("dram", link)) for link in links])

    assert load.seconds == pytest.approx(1.23, abs=0.005)
    assert load.binding == "dram"
    assert all(load.utilisation[link] == pytest.approx(1 / load.seconds) for link in links)


@PROPERTY
@given(RATES, FLOWS)
def test_the_binding_pipe_is_full_and_no_other_is_fuller(rates: dict[str, float], flows: list[Flow]) -> None:
    load = topology(rates).load(flows)

    assert all(0 <= share <= 1 for share in load.utilisation.values())
    if load.seconds:
        assert load.utilisation[load.binding] == 1


@PROPERTY
@given(RATES, FLOWS, FLOWS)
def test_more_flows_are_never_faster_nor_slower_than_one_after_the_other(
    rates: dict[str, float], flows: list[Flow], others: list[Flow]
) -> None:
    pipes = topology(rates)
    both = pipes.load([*flows, *others]).seconds
    first, second = pipes.load(flows).seconds, pipes.load(others).seconds

    assert max(first, second) <= both * (1 + 1e-9)
    assert both <= (first + second) * (1 + 1e-9)


def test_no_flows_take_no_time() -> None:
    pipes = topology({"bus": 1.0})
    for flows in ([], [Flow(0, ("bus",))], [Flow(9, ())]):
        assert pipes.load(flows).seconds == 0
        assert pipes.load(flows).binding == "nothing"


def test_a_route_through_an_unknown_pipe_is_an_error() -> None:
    with pytest.raises(KeyError):
        topology({"bus": 1.0}).load([Flow(1, ("buss",))])


def test_two_pipes_of_one_name_are_an_error() -> None:
    with pytest.raises(ValueError, match="same name"):
        Topology([Pipe("bus", 1.0), Pipe("bus", 2.0)])


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_pipe_that_carries_nothing_is_an_error(rate: float) -> None:
    with pytest.raises(ValueError, match="carries nothing"):
        Pipe("bus", rate)
