"""Numbers of models: in the order in which they come, or as configured, and never those of others."""

from __future__ import annotations

import pytest

from kapsl_scheduler.errors import InvalidInput, ModelNotLoaded
from kapsl_scheduler.server.model_ids import ModelIds


def test_models_are_counted_in_the_order_in_which_they_come() -> None:
    ids = ModelIds()

    assert [ids.assign(name) for name in ("b", "a", "b", "c")] == [0, 1, 0, 2]
    assert [ids.name(id) for id in range(3)] == ["b", "a", "c"]
    assert (ids.of("a"), ids.names()) == (1, ["b", "a", "c"])


def test_configured_ids_are_kept_free_for_their_models() -> None:
    ids = ModelIds({"a": 1, "z": 0})

    assert [ids.assign(name) for name in ("b", "c", "a")] == [2, 3, 1]
    with pytest.raises(ModelNotLoaded, match=r"^Model 0 not found$"):
        ids.name(0)
    with pytest.raises(InvalidInput, match="0 is the id of model 'z', expected one that is free"):
        ids.assign("d", 0)


def test_an_id_may_be_asked_for() -> None:
    ids = ModelIds()

    assert ids.assign("a", 7) == 7
    assert ids.assign("b") == 0
    assert ids.assign("a", 7) == 7
    with pytest.raises(InvalidInput, match="8 came, and model 'a' has the id 7"):
        ids.assign("a", 8)
    with pytest.raises(InvalidInput, match="7 is the id of model 'a'"):
        ids.assign("c", 7)
    assert ids.names() == ["b", "a"]


def test_an_id_that_was_counted_out_is_nobody_elses_later() -> None:
    ids = ModelIds()
    ids.assign("a")
    ids.forget("a")
    ids.forget("never")

    assert ids.assign("b") == 1
    for id in (0, 2):
        with pytest.raises(ModelNotLoaded, match=f"^Model {id} not found$"):
            ids.name(id)
    with pytest.raises(ModelNotLoaded, match="model 'a' has no id"):
        ids.of("a")


def test_the_id_of_a_model_that_never_came_is_counted_out_again() -> None:
    ids = ModelIds()
    ids.assign("a")
    ids.assign("b")
    ids.release("b")

    assert ids.assign("c") == 1
    ids.assign("d", 9)
    ids.release("d")
    assert (ids.assign("e"), ids.assign("f", 9)) == (2, 9)


def test_two_models_cannot_be_configured_for_one_id() -> None:
    with pytest.raises(ValueError, match="expected an id for each model, got 3 for 'a' and for 'b'"):
        ModelIds({"a": 3, "b": 3})
