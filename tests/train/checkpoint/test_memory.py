"""What a checkpoint costs in memory."""

from __future__ import annotations

from dlopt.optim.optimizers import Adam
from tests.train.checkpoint.test_checkpoints import advance, assert_equal, fresh, weights


def test_a_checkpoint_costs_what_weights_and_optimizer_take_and_less_where_the_weights_are_the_best() -> None:
    """In bytes of memory that training does not hold anyway; numbers that count steps beside."""
    state = fresh(Adam())
    advance(state, 2)
    state.keep_best()
    size, parameters = (sum(value.nbytes for value in some if value.dim()) for some in (state.best.values(), state.model.parameters()))

    def cost() -> int:
        held = {value.untyped_storage().data_ptr() for value in (*state.best.values(), *state.model.state_dict().values())}
        tensors = [value for part in state.packed().tensors.values() for value in part.values() if value.dim()]
        storages = {one.data_ptr(): one.nbytes() for one in (value.untyped_storage() for value in tensors)}
        return sum(nbytes for address, nbytes in storages.items() if address not in held)

    assert cost() == 2 * parameters
    before = state.packed()
    assert_equal(before.tensors["model"], before.tensors["best"])
    advance(state, 1)
    assert cost() == 2 * parameters + size
    assert_equal(state.packed().tensors["model"], weights(state))
    assert_equal(before.tensors["model"], state.best)
