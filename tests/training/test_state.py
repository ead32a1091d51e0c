"""States of unfinished training: what goes in comes out, and nothing else does."""

import pytest
import torch
from torch import nn

from cellformers.training.optimiser import adamw, set_rate
from cellformers.training.state import has_state, load_state, restore_optimizer, save_state

SETTINGS = {"learning_rate": 0.1, "inputs": {"tokens": "sha256:a"}}


def trained(steps=3):
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    optimizer = adamw(layer.named_parameters(), weight_decay=0.1)
    take(layer, optimizer, steps)
    return layer, optimizer


def take(layer, optimizer, steps):
    set_rate(optimizer, 0.1)
    for number in range(steps):
        optimizer.zero_grad()
        layer(torch.full((4, 3), float(number + 1))).square().sum().backward()
        optimizer.step()


def save(folder, layer, optimizer, step, **changes):
    options = {"extra": {"tokens": 7, "losses": [0.1]}, "settings": SETTINGS, **changes}
    return save_state(folder, step=step, network_state=layer.state_dict(), optimizer=optimizer, **options)


def test_training_goes_on_to_the_bit(tmp_path):
    layer, optimizer = trained()
    save(tmp_path, layer, optimizer, 3)
    take(layer, optimizer, 2)

    state = load_state(tmp_path, settings=SETTINGS)
    assert state.step == 3
    assert state.extra == {"tokens": 7, "losses": [0.1]}
    other = nn.Linear(3, 2)
    again = adamw(other.named_parameters(), weight_decay=0.1)
    other.load_state_dict(state.network)
    restore_optimizer(again, state)
    take(other, again, 2)
    assert torch.equal(layer.weight, other.weight)
    assert torch.equal(layer.bias, other.bias)


def test_the_last_two_are_kept_and_the_newest_is_taken(tmp_path):
    layer, optimizer = trained()
    assert not has_state(tmp_path)
    assert load_state(tmp_path, settings=SETTINGS) is None
    for step in (5, 10, 15):
        path = save(tmp_path, layer, optimizer, step)
    assert has_state(tmp_path)
    assert sorted(int(p.stem.split("-")[1]) for p in path.parent.iterdir()) == [10, 15]
    assert load_state(tmp_path, settings=SETTINGS).step == 15


def test_a_damaged_state_gives_way_to_the_one_before(tmp_path):
    layer, optimizer = trained()
    save(tmp_path, layer, optimizer, 5)
    newest = save(tmp_path, layer, optimizer, 10)
    newest.write_bytes(newest.read_bytes()[:200])
    notes = []
    assert load_state(tmp_path, settings=SETTINGS, note=notes.append).step == 5
    assert "damaged" in notes[0]
    assert str(newest) in notes[0]


def test_states_of_other_settings_are_left_alone_and_named(tmp_path):
    layer, optimizer = trained()
    save(tmp_path, layer, optimizer, 5)
    notes = []
    other = {"learning_rate": 0.2, "inputs": {"tokens": "sha256:b"}}
    assert load_state(tmp_path, settings=other, note=notes.append) is None
    assert len(notes) == 1
    assert "stopped at step 5 had other settings (inputs.tokens, learning_rate)" in notes[0]
    save(tmp_path, layer, optimizer, 1, settings=other)
    assert load_state(tmp_path, settings=other).step == 1
    assert load_state(tmp_path, settings=SETTINGS).step == 5


def test_what_is_not_a_number_is_refused(tmp_path):
    layer, optimizer = trained()
    with pytest.raises(ValueError, match="JSON compliant"):
        save(tmp_path, layer, optimizer, 5, extra={"loss": float("nan")})
    assert not has_state(tmp_path)
