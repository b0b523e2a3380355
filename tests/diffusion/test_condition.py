"""Conditions: rows without a prompt, dropped, joined and extended, nested dictionaries included."""

import torch
from fewstep.distill.diffusion.condition import Condition
from torch import Tensor


def sdxl_like(rows: int, offset: float = 0.0) -> Condition:
    """Text states (B, 3, 2) and SDXL's nested added_cond_kwargs; values tell rows and keys apart."""
    row = offset + torch.arange(1.0, rows + 1)
    return Condition(
        {
            "encoder_hidden_states": row.view(-1, 1, 1).expand(rows, 3, 2).clone(),
            "added_cond_kwargs": {"text_embeds": 10 * row.view(-1, 1), "time_ids": 100 * row.view(-1, 1)},
        },
        {
            "encoder_hidden_states": torch.full((1, 3, 2), -1.0),
            "added_cond_kwargs": {
                "text_embeds": torch.full((1, 1), -10.0),
                "time_ids": torch.full((1, 1), 512.0),
            },
        },
    )


def columns(condition: Condition) -> list[list[float]]:
    """One number per row of each leaf."""
    nested = condition.arguments["added_cond_kwargs"]
    leaves: list[Tensor] = [
        condition.arguments["encoder_hidden_states"],
        nested["text_embeds"],
        nested["time_ids"],
    ]
    return [leaf.flatten(1)[:, 0].tolist() for leaf in leaves]


def test_length_is_the_number_of_rows_even_where_the_first_leaf_is_nested() -> None:
    assert len(sdxl_like(3)) == 3
    nested_first = Condition({"a": {"b": {"c": torch.zeros(5, 2)}}}, {"a": {"b": {"c": torch.zeros(1, 2)}}})
    assert len(nested_first) == 5


def test_null_gives_every_row_the_empty_value_and_leaves_the_original() -> None:
    condition = sdxl_like(3)
    null = condition.null()
    assert columns(null) == [[-1.0] * 3, [-10.0] * 3, [512.0] * 3]
    assert null.arguments["encoder_hidden_states"].shape == (3, 3, 2)
    assert columns(null.null()) == columns(null)
    assert columns(condition) == [[1.0, 2.0, 3.0], [10.0, 20.0, 30.0], [100.0, 200.0, 300.0]]


def test_drop_empties_exactly_the_masked_rows() -> None:
    dropped = sdxl_like(3).drop(torch.tensor([False, True, False]))
    assert columns(dropped) == [[1.0, -1.0, 3.0], [10.0, -10.0, 30.0], [100.0, 512.0, 300.0]]
    assert (dropped.arguments["encoder_hidden_states"][1] == -1).all()
    assert columns(sdxl_like(3).drop(torch.ones(3, dtype=torch.bool))) == columns(sdxl_like(3).null())


def test_drop_keeps_the_dtype_of_the_arguments() -> None:
    half = Condition({"text": torch.ones(2, 3, dtype=torch.float16)}, {"text": torch.zeros(1, 3)})
    assert half.drop(torch.tensor([True, False])).arguments["text"].dtype == torch.float16


def test_cat_joins_rows_in_order_and_keeps_the_empty_value() -> None:
    joined = Condition.cat([sdxl_like(2), sdxl_like(1, offset=6.0), sdxl_like(2).null()])
    assert len(joined) == 5
    assert columns(joined)[0] == [1.0, 2.0, 7.0, -1.0, -1.0]
    assert columns(joined)[2] == [100.0, 200.0, 700.0, 512.0, 512.0]
    assert columns(joined.null())[1] == [-10.0] * 5


def test_with_adds_an_argument_and_leaves_the_original() -> None:
    condition = sdxl_like(2)
    extended = condition.with_(timestep_cond=torch.tensor([[5.0], [5.0]]))
    assert extended.arguments["timestep_cond"].tolist() == [[5.0], [5.0]]
    assert columns(extended) == columns(condition)
    assert "timestep_cond" not in condition.arguments and "timestep_cond" not in condition.empty
    assert extended.null().arguments["timestep_cond"].tolist() == [[5.0], [5.0]]


def test_with_arguments_survive_null_and_drop_row_by_row() -> None:
    guidance = torch.tensor([[5.0], [9.0]])
    extended = sdxl_like(2).with_(timestep_cond=guidance)
    assert torch.equal(extended.null().arguments["timestep_cond"], guidance)
    assert torch.equal(extended.drop(torch.tensor([False, True])).arguments["timestep_cond"], guidance)


def test_to_converts_every_leaf() -> None:
    converted = sdxl_like(2).to(torch.float64)
    for tree in (converted.arguments, converted.empty):
        assert tree["encoder_hidden_states"].dtype == torch.float64
        assert tree["added_cond_kwargs"]["time_ids"].dtype == torch.float64
    assert columns(converted) == columns(sdxl_like(2))
