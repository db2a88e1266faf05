"""The chunk of a vision-language model: transformers' vision tower on the first pipeline stage, Megatron's GPT for all the rest.

Owns where picture features enter the language model and how their gradients come back under tensor and sequence parallelism. Must not
know families, HF names, files or losses. A forward pass leaves nothing on a module, so that any number of them may wait for their
backward passes (pipelines) and be computed again (recomputation).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from rlsync.megatron.config import VisionConfig
from rlsync.megatron.context import Share
from rlsync.megatron.packing import Packing
from rlsync.megatron.parallel import compute_device
from rlsync.megatron.pictures import Pictures, check_pictures, places_of, positions_of
from rlsync.megatron.tower import build_tower


class MultimodalRotary(torch.nn.Module):
    """Angles of a rotary embedding whose frequencies are turned by one of three positions each.

    Args:
        axes: position that turns each frequency, from ``axes_of_frequencies``; half as many as a head has dimensions.
        theta: base of the frequencies.
    """

    def __init__(self, axes: Sequence[int], theta: float) -> None:
        super().__init__()
        exponents = torch.arange(len(axes), dtype=torch.float32, device=compute_device()) / len(axes)
        self.inverse_frequencies = torch.nn.Buffer(1.0 / theta**exponents, persistent=False)
        self.axes = torch.nn.Buffer(torch.tensor(axes, device=compute_device()), persistent=False)

    def forward(self, positions: Tensor, *_: Any, **__: Any) -> Tensor:
        """Angles (S, B, 1, head_dim) float32 of positions (3, B, S); what else GPTModel passes is of its own class."""
        angles = positions.to(torch.float32)[self.axes].permute(2, 1, 0) * self.inverse_frequencies
        return torch.cat((angles, angles), dim=-1)[:, :, None]


class PictureLayer(TransformerLayer):
    """A decoder layer behind which features of pictures are added to the hidden states: the i-th features behind the i-th layer.

    They come as the ``context`` (num_features, k, H) and their places (see ``Pictures``) as the ``context_mask`` of cross-attention,
    which a decoder has not: Megatron hands both from layer to layer and through recomputation, with their gradients.
    """

    def forward(
        self, hidden_states: Tensor, *args: Any, context: Tensor | None = None, context_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(S, B, H) as of TransformerLayer, and the context as long as a later layer needs it."""
        hidden_states, _ = super().forward(hidden_states, *args, **kwargs)
        index = self.layer_number - 1
        if context is None or context_mask is None or index >= context.size(0):
            return hidden_states, None
        added = hidden_states.flatten(0, 1).index_add(0, context_mask, context[index]).view_as(hidden_states)
        # Schedules that free outputs refuse views.
        hidden_states = make_viewless_tensor(added, requires_grad=added.requires_grad, keep_graph=True)
        return hidden_states, context if index + 1 < context.size(0) else None


class VisionLanguageModel(GPTModel):
    """A GPTModel that takes pictures. ``visual``, transformers' tower, is on the first pipeline stage, whole on each tensor rank.

    Every tensor rank of that stage computes all pictures, and its gradient of the tower is the whole one: each rank's features go to
    its own part of the sequence, and the gradients of features are summed before they enter the tower. The optimizer step averages
    them once more over the tensor ranks, because kernels that add in any order would let replicas drift apart.

    Args:
        config: with ``mrope_section``.
        vision: the tower, picture tokens and the rotary embedding.
        rotary_base: base of the frequencies.
        kwargs: of GPTModel.
    """

    def __init__(self, *, config: TransformerConfig, vision: VisionConfig, rotary_base: float, **kwargs: Any) -> None:
        super().__init__(config=config, position_embedding_type="mrope", rotary_base=rotary_base, **kwargs)
        self.vision = vision.model
        # Megatron's own class, which is replaced, knows consecutive sections only.
        self.rotary_pos_emb = MultimodalRotary(vision.mrope_axes, rotary_base)
        if self.pre_process:
            taken, layers = vision.model.deepstack_visual_indexes, len(self.decoder.layers)
            assert len(taken) <= layers, f"deepstack_visual_indexes {taken} for a first chunk of {layers} layers"
            self.visual = _build_tower(vision, config)
            # Parameters are gathered ahead of the forward pass in the order of registration: the decoder comes after the tower.
            for name in [name for name, _ in self.named_children() if name not in ("embedding", "visual")]:
                module = getattr(self, name)
                delattr(self, name)
                self.add_module(name, module)

    def arguments(
        self, tokens: Tensor, microbatch: Mapping[str, Tensor], packing: Packing | None = None, share: Share | None = None
    ) -> dict[str, Any]:
        """What ``forward`` takes beside ``tokens`` (B, S), or beside these packed, or beside what this rank has of them (``share``),
        checked. Not collective.

        Raises:
            ConfigError: see ``check_pictures``.
        """
        check_pictures(tokens, microbatch, self.vision)
        grid = microbatch.get("image_grid_thw")
        positions = positions_of(tokens, grid, self.vision)
        if packing is not None:
            tokens, positions = packing.pack(tokens), torch.stack([packing.pack(along) for along in positions])
        elif share is not None:
            # Of packed sequences attention takes the angles of all positions, and cuts them itself.
            positions = share.own(positions, 2)
        arguments: dict[str, Any] = {"position_ids": positions.to(compute_device())}
        if grid is None or not self.pre_process:
            return arguments
        held = torch.arange(tokens.size(1))
        if share is not None:
            held = share.own(held, 0)
        if self.config.sequence_parallel:
            held = held.chunk(self.config.tensor_model_parallel_size)[parallel_state.get_tensor_model_parallel_rank()]
        places, rows = places_of(tokens, self.vision, held)
        return {**arguments, "pictures": Pictures(microbatch["pixel_values"], grid, places, rows)}

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None, *, pictures: Pictures | None = None, **kwargs: Any
    ) -> Tensor:
        """As of GPTModel. Collective over the TP group, as its layers are.

        Args:
            input_ids: (B, S) int64, under context parallelism those of this rank.
            position_ids: (3, B, S) int64; without pictures also (B, S). Of packed sequences under context parallelism those of all ranks.
            attention_mask: None: padding belongs at the right.
            pictures: of this microbatch, from ``arguments``; not read behind the first stage.
            kwargs: of GPTModel.
        """
        if position_ids.dim() == 2:
            assert pictures is None, "pictures have positions in three dimensions"
            position_ids = position_ids.expand(3, -1, -1)
        if self.pre_process:
            embeddings = self.embedding(input_ids=input_ids, position_ids=None)
            kwargs["decoder_input"], kwargs["extra_block_kwargs"] = self._with_pictures(embeddings, pictures)
        return super().forward(input_ids, position_ids, attention_mask, **kwargs)

    def _with_pictures(self, embeddings: Tensor, pictures: Pictures | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Embeddings (S, B, H) of this rank with those of pictures in their places, and what ``PictureLayer`` takes of the rest."""
        if pictures is None:
            if not any(parameter.requires_grad for parameter in self.visual.parameters()):
                return embeddings, {}
            # Data-parallel ranks with and without pictures reduce and gather the same parameters in the same order.
            pictures = self._placeless_picture()
        device = embeddings.device
        output = self.visual(pictures.pixel_values.to(device), grid_thw=pictures.grid.to(device), return_dict=True)
        features = torch.stack((output.pooler_output, *getattr(output, "deepstack_features", ()))).to(embeddings.dtype)
        if self.config.sequence_parallel:
            features = tensor_parallel.copy_to_tensor_model_parallel_region(features)
        if pictures.rows is not None:
            features = features.index_select(1, pictures.rows.to(device))
        places = pictures.places.to(device)
        embeddings = embeddings.flatten(0, 1).index_copy(0, places, features[0]).view_as(embeddings)
        return embeddings, {"context": features[1:], "context_mask": places} if len(features) > 1 else {}

    def _placeless_picture(self) -> Pictures:
        """A picture of one token that goes nowhere: the tower's gradients are zeros, whatever its features are."""
        side, nowhere = self.vision.spatial_merge_size, torch.empty(0, dtype=torch.int64)
        return Pictures(torch.zeros(side**2, self.vision.patch_dim), torch.tensor([[1, side, side]]), nowhere, nowhere)


def _build_tower(vision: VisionConfig, config: TransformerConfig) -> torch.nn.Module:
    visual = build_tower(vision.model.tower, vision.tower, dtype=config.params_dtype, device=compute_device())
    if config.recompute_granularity == "full":
        visual.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in visual.parameters():
        parameter.average_gradients_across_tp_domain = True  # read by finalize_model_grads
    return visual
