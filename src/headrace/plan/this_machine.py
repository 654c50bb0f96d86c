"""Converts the profile of this machine into a forecast's `Machine`."""

from headrace.forecast.machine import Machine
from headrace.forecast.predict import HOST_LEAST_LEFT
from headrace.plan.profile import Profile


def this_machine(profile: Profile, memory_bytes: float) -> Machine:
    """The profiled machine as a forecast's `Machine`: measured rates, not peaks."""
    packed = profile.kernel("Q4_K", 1) * 4.5 / 8
    is_unmeasured = profile.source == "guessed"
    return Machine(
        name=profile.machine,
        family="cpu",
        device="this processor",
        devices=1,
        nodes=1,
        device_bytes_per_s=packed,
        device_memory_bytes=max(
            memory_bytes / 0.85, memory_bytes + HOST_LEAST_LEFT
        ),  # includes the reserve that the forecast subtracts
        flop_per_s=profile.gemm(512, precise=not profile.bf16_pays),
        unified=True,
        bus_bytes_per_s=packed,
        peer_bytes_per_s=0.0,
        network_bytes_per_s=0.0,
        host_bytes_per_s=packed,
        host_memory_bytes=memory_bytes,
        host_flop_per_s=profile.gemm(512, precise=True),
        root_bytes_per_s=packed,
        disk_bytes_per_s=min(profile.disk_bytes_per_s.values(), default=1e9),
        watts=None,
        price_usd=None,
        rent_usd_per_h=None,
        spot_usd_per_h=None,
        assumptions=("this machine has not been measured: run `headrace probe`",) if is_unmeasured else (),
        sources=(f"this machine: {profile.source}",),
    )
