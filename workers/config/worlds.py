"""What the worlds that a run makes itself can be: rules between the keys of ``arithmetic``, and between those of ``pictures``. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from workers.config.schema import ArithmeticRecipe, PictureRecipe

# The smallest head that vLLM's attention on CPU computes.
HEAD_DIM = 32
# Experts of a token, where a model has some.
EXPERTS_OF_A_TOKEN = 2


def misfits_of_arithmetic(recipe: ArithmeticRecipe) -> Iterator[str]:
    """Why no such folder can be made, beside what the bounds of each key say."""
    yield from _width("arithmetic.hidden_size", recipe.hidden_size)
    num_problems = (recipe.max_operand + 1) ** 2
    if recipe.num_held_out >= num_problems:
        yield f"arithmetic.num_held_out ({recipe.num_held_out}) must be less than the {num_problems} problems that there are"
    if 0 < recipe.num_experts < EXPERTS_OF_A_TOKEN:
        yield f"arithmetic.num_experts ({recipe.num_experts}) must be 0, for a dense model, or at least {EXPERTS_OF_A_TOKEN}"


def misfits_of_pictures(recipe: PictureRecipe) -> Iterator[str]:
    """Why no such folder can be made, beside what the bounds of each key say."""
    for name in ("hidden_size", "vision_hidden_size"):
        yield from _width(f"pictures.{name}", getattr(recipe, name))
    if not recipe.questions:
        yield "pictures.questions names nothing that pictures could be asked about: shape, colour or digit"


def _width(name: str, size: int) -> Iterator[str]:
    if size % HEAD_DIM:
        yield f"{name} ({size}) must be a multiple of the head size {HEAD_DIM}"
