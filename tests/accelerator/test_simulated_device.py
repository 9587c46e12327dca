"""The simulated device fails where a GPU would: each rule, and a fault against it."""

from __future__ import annotations

import ctypes

import pytest
import torch
from device_child import DEVICE, on_device, outcome
from simulated_device import SimulatedDevice

CRASH = -11


def _side_stream(ordered: bool) -> torch.Tensor:
    """A copy down on a stream of its own, of what the current stream makes."""
    side, pinned = torch.Stream(device=DEVICE), torch.empty(8, pin_memory=True)
    made = torch.ones(8, device=DEVICE) * 3
    ready = torch.Event(device=DEVICE)
    ready.record()
    if ordered:
        side.wait_event(ready)
    with side:
        pinned.copy_(made, non_blocking=True)
        done = torch.Event(device=DEVICE)
        done.record()
    done.synchronize()
    return pinned


def _in_order(device: SimulatedDevice) -> None:
    with device.delays(compute=3000):
        assert _side_stream(ordered=True).tolist() == [3.0] * 8
    seen = device.observed()
    assert seen.violations == []
    assert (seen.copies_down, seen.bytes_down, seen.waits["event"]) == (1, 32, 1)
    assert [ran.name for ran in seen.trace][-2:] == ["aten::mul", "copy down"]


def test_events_order_streams() -> None:
    on_device(_in_order)


def _without_event(device: SimulatedDevice) -> None:
    with device.delays(compute=3000):
        assert torch.isnan(_side_stream(ordered=False)).any()
    assert device.observed().violations == [
        "copy down on stream 1 reads what aten::mul on stream 0 writes, and no event is between "
        "them"
    ]


def test_a_missing_event_is_seen() -> None:
    on_device(_without_event)


def _host_read(device: SimulatedDevice) -> None:
    ctypes.string_at(torch.ones(4, device=DEVICE).data_ptr(), 4)


def test_the_host_cannot_touch_device_memory() -> None:
    assert outcome(_host_read)[0] == CRASH


def _early_read(device: SimulatedDevice) -> None:
    pinned = torch.zeros(4, pin_memory=True)
    with device.delays(down=3000):
        pinned.copy_(torch.ones(4, device=DEVICE), non_blocking=True)
        assert torch.isnan(pinned).all()
        torch.accelerator.synchronize()
        assert pinned.tolist() == [1.0] * 4


def test_a_copy_down_is_not_there_before_it_ran() -> None:
    on_device(_early_read)


def _early_reuse(device: SimulatedDevice) -> None:
    pinned = torch.zeros(4, pin_memory=True)
    with device.delays(up=3000):
        sent = pinned.to(DEVICE, non_blocking=True)
        pinned.fill_(7)
        assert sent.tolist() == [7.0] * 4
    assert device.observed().violations == ["pinned memory was written before its copy up ran"]


def test_pinned_memory_that_is_reused_too_early_is_seen() -> None:
    on_device(_early_reuse)


def _freed(device: SimulatedDevice, recorded: bool) -> None:
    side = torch.Stream(device=DEVICE)
    made = torch.ones(8, device=DEVICE)
    side.wait_stream(torch.accelerator.current_stream())
    with device.delays(compute=3000):
        with side:
            doubled = made * 2
            if recorded:
                made.record_stream(side)
        del made
    assert doubled.tolist() == [2.0] * 8 or not recorded
    assert bool(device.observed().violations) == (not recorded)


@pytest.mark.parametrize("recorded", [True, False])
def test_memory_that_another_stream_still_reads(recorded: bool) -> None:
    on_device(_freed, recorded)


def _waits(device: SimulatedDevice) -> None:
    pageable, pinned = torch.ones(4), torch.ones(4, pin_memory=True)
    assert pinned.is_pinned() and pinned[2:].is_pinned() and not pageable.is_pinned()
    reasons = {
        "pageable": lambda: pageable.to(DEVICE, non_blocking=True),
        "copy": lambda: pinned.to(DEVICE),
        "item": lambda: torch.ones((), device=DEVICE).item(),
        "fallback": lambda: torch.ones(3, device=DEVICE).nonzero(),
        "stream": lambda: torch.accelerator.current_stream().synchronize(),
        "device": torch.accelerator.synchronize,
    }
    for reason, work in reasons.items():
        device.clear()
        work()
        waits = device.observed().waits
        assert waits[reason] == 1 and sum(waits.values()) == 1, reason
    device.clear()
    pinned.to(DEVICE, non_blocking=True)
    assert sum(device.observed().waits.values()) == 0


def test_waits_of_the_host_are_counted_by_their_kind() -> None:
    on_device(_waits)


def _elsewhere(device: SimulatedDevice) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        torch.ones(3, 3, device=DEVICE) @ torch.ones(3, 3)
    assert (torch.ones(3, device=DEVICE) * torch.tensor(2.0)).tolist() == [2.0] * 3


def test_operands_are_not_fetched_from_the_host() -> None:
    on_device(_elsewhere)


def _random(device: SimulatedDevice) -> None:
    torch.manual_seed(3)
    state = torch.simulated.get_rng_state()
    first = torch.nn.functional.dropout(torch.ones(64, device=DEVICE), 0.5)
    second = torch.rand(64, device=DEVICE)
    torch.simulated.set_rng_state(state)
    assert torch.equal(first, torch.nn.functional.dropout(torch.ones(64, device=DEVICE), 0.5))
    assert torch.equal(second, torch.rand(64, device=DEVICE))
    assert not torch.equal(second, torch.rand(64, device=DEVICE))


def test_random_numbers_follow_from_the_seed() -> None:
    on_device(_random)


def _operations(device: SimulatedDevice) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(4, 3, 10), torch.randn(5, 3, 3)

    def results(x: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = torch.nn.functional.conv1d(x, w).cumsum(-1)
        y = torch.cat([y[:, ::2], y.flip(1)[:, :1]], 1).index_select(0, y.new_tensor([2, 0]).long())
        turned = torch.view_as_complex(y[..., :8].reshape(*y.shape[:-1], 4, 2).contiguous())
        loss = (torch.view_as_real(turned * turned.conj()).sum() + y[y > 0].sum()).tanh()
        loss.backward()
        y = y.detach().clone()
        y[:, 1:2].masked_fill_(y[:, 1:2] < 0, 0.5)
        return [y, loss, x.grad, w.grad, y.topk(2).values, y.sort().indices, y.unfold(2, 3, 2)]

    for got, want in zip(results(x.to(DEVICE), w.to(DEVICE)), results(x, w), strict=True):
        torch.testing.assert_close(got.cpu(), want)
    assert device.observed().violations == []


def test_operations_compute_what_they_do_on_the_cpu() -> None:
    on_device(_operations)
