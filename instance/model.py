"""A transformers model whose attention is ours.

The model runs a whole ragged step as one row `[1, T]`; its attention layers call `DistAttention` through transformers'
`AttentionInterface`. Only that function is registered, no mask function: transformers then builds no mask.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distattn.shape import AttentionShape
from gmanager.wire.scaling import RopeScaling
from instance.calls import (
    Call,
    agreed_sights,
    call_of,
    not_through_the_interface,
    refuse_arguments,
    refuse_calls,
    refuse_layer_types,
    refuse_state,
    whole_shape,
)
from instance.context import AttentionContext
from instance.errors import UnsupportedModel
from instance.fused import FusedDecoder, Hidden, OwnRow
from instance.latent import LatentHeads, bind_latents, latent_shape
from instance.layers import Mixture, bind_experts, bind_packed, experts_of_a_row, has_known_parts
from instance.parts import bind_stage, bind_team
from instance.quantised import quantised_parts
from instance.rotary import fix_rotary, longest_text, refuse_unscaled
from instance.sights import ruled_as
from instance.split import WHOLE, Place
from instance.team import Team
from kernels.experts import ExpertWeights
from kernels.products import rows_of_each_kernel as rows_of_each_product
from kvstore.format import KVFormat
from kvstore.sight import FULL, Sight
from kvstore.storage import KVStorage

ATTENTION = "distattn"
"""Our attention's name in transformers."""

TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.2}
"""What rounding explains of a row's logits, as `relative` counts; 30 layers of random weights: 0.03 in bf16."""

# What a model's code raises when it is run in a way it wasn't written for.
_FOREIGN_ERRORS = (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError)


class Model:
    """A loaded causal language model: rows in, logits of chosen rows out."""

    def __init__(
        self,
        module: PreTrainedModel,
        max_context: int | None = None,
        scaling: RopeScaling | None = None,
        team: Team | None = None,
        place: Place = WHOLE,
        sights: tuple[Sight, ...] = (),
    ) -> None:
        """`max_context`: tokens of the longest sequence served; None: as many as the config says. `scaling`: of its rotary
        frequencies, as the config has it already; None: the model's own. `place`: of the rank whose part `module` is
        (`instance.parts`). `team`: of the ranks that have the same layers; they all make theirs, and call what runs layers, at
        once. `sights`: what rows see in each layer of the whole model, where a stage's may not have them all.

        Raises UnsupportedModel by the name of what can't be served exactly, as far as layers show it; `instance.exact` compares
        the whole.
        """
        config = module.config.get_text_config()
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False  # for a loss in training; attention would be called with it
        self.module = module
        self.place = place
        """With the layers of each stage, if there are several."""
        bind_packed(module)
        self._base: Any = _decoder(module)
        self._output: Any = None
        """What `_base` returns: a class with fields of the model's own, all but the hidden states empty in `logits`."""
        self.num_layers: int = config.num_hidden_layers
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        declared = longest_text(config, max_context)
        self.context = AttentionContext(team)
        if team is not None:
            bind_team(module, self.vocab_size, self.context)
        if place.stages > 1:
            bind_stage(module, self.context)
        self._base.forward = _unless_given(self._base.forward, self.context)
        _scale_by_place(module, self.context)
        self.device = module.device
        if scaling is not None:
            refuse_unscaled(module, scaling)
        self.rotary = fix_rotary(module, declared) or (None if scaling is None else str(scaling))
        """What the service has chosen of its frequencies: another scaling than the model's own, or those that all texts have
        where they would depend on the batch."""
        refuse_state(config, is_stateful=getattr(module, "_is_stateful", False))
        refuse_layer_types(config)
        self._fused: FusedDecoder | None = None
        self._backend = ""
        self._experts: list[ExpertWeights] = []
        """That kernels of ours run in layers that aren't fused."""
        self.heads_shape = _of_whole(self._probe(declared), sights, self.num_layers)
        """Of attention as the layers call it."""
        self.shape = self.heads_shape
        """Of what is stored and attended to: of latents where the layers have some."""
        self.kv_format = KVFormat(self.heads_shape.dtype)
        """How it is stored."""
        self._latents: list[LatentHeads] = []
        if not any(call.has_sinks for call in self._calls):
            self._latents = bind_latents(module, self.heads_shape, self.context, is_part=place.parts > 1)
        if self._latents:
            self.shape = latent_shape(self.heads_shape, self._latents[0].dims)
        if declared is None:
            raise UnsupportedModel(
                f"{config.model_type}: its config has no max_position_embeddings, so its longest context is unknown: give "
                "--max-context"
            )
        self.max_context = declared

    def keep_heads(self) -> None:
        """Store keys and values of all heads from now on, also where layers have latents."""
        for latents in self._latents:
            latents.release()
        self._latents = []
        self.shape = self.heads_shape

    @property
    def fused(self) -> FusedDecoder | None:
        """The layers, if they run fused."""
        return self._fused

    def fuse(self, backend: str) -> str | None:
        """Run the layers with merged projections and fused kernels from now on, if they are made like Llama's or Gemma's.

        Returns why not, or None if they do. Then experts alone run by kernels of ours, if they can.
        """
        self._backend = backend
        reason = self._fuse(backend)
        if reason is not None:
            self.unfuse()
        return reason

    @property
    def is_quantised(self) -> bool:
        """Whether linear layers have weights of 8 bits."""
        return bool(quantised_parts(self.module))

    def rows_to_warm(self, most: int) -> list[int]:
        """Numbers of rows, up to `most`, that use all kernels of ours that are compiled for the number of rows."""
        products = rows_of_each_product(most) if self._backend == "triton" and self.is_quantised else []
        return sorted({*self._mixture_rows(most), *products})

    def _mixture_rows(self, most: int) -> list[int]:
        """Numbers of rows, up to `most`, that use all kernels of ours which run experts; none, if transformers' own do."""
        feeds = [] if self._fused is None else [feed for feed in self._fused.feeds() if isinstance(feed, Mixture)]
        if not feeds and not self._experts:
            return []
        from kernels.experts_triton import rows_of_each_kernel  # it needs Triton, which an instance on the CPU does without

        if feeds:
            return rows_of_each_kernel(most, feeds[0].top_k, feeds[0].experts)
        return rows_of_each_kernel(most, experts_of_a_row(self.module), self._experts[0])

    def _fuse(self, backend: str) -> str | None:
        if not has_known_parts(self.module):
            return "they have other parts than Llama's or Gemma's"
        if any(call.value_dim < call.shape.head_dim for call in self._calls):
            return "their values are narrower than keys"
        self.context.attention = OwnRow(self.shape, backend)
        try:
            fused = FusedDecoder.of(
                self.module, backend, self.max_context, lambda: self.context.team, lambda: self.context.sharing
            )
            if fused is None:
                return "their norms or activations are others than Llama's or Gemma's"
            with torch.inference_mode():
                if not (fused.ends_agree() and fused.agrees(self.context.attention)):
                    return "they compute something else than Llama's or Gemma's"
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # of layers that ask for more than Llama's
            return f"they can't be run alone to compare ({type(error).__name__}: {error})"
        finally:
            self.context.attention = None
        self._fused = fused
        return None

    def unfuse(self) -> None:
        """Run the layers as transformers has them, but for experts that kernels of ours can run; weights stay merged. All ranks
        of a team do so at once."""
        self._fused = None
        for part in quantised_parts(self.module):
            part.backend = self._backend
        if self.device.type != "meta":
            team = self.context.team
            summed = (team.sum,) if team is not None else ()
            self._experts = bind_experts(self.module, self._backend, *summed)

    def run(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> Hidden:
        """All layers, of rows `[T]` (int64, or int32 where fused). Attention: `context.attention`."""
        if self._fused is not None:
            return self._fused.run(token_ids_T, positions_T, self.context.needed())
        out = self._base(input_ids=token_ids_T.unsqueeze(0), position_ids=positions_T.unsqueeze(0), use_cache=False)
        self._output = type(out)
        return Hidden(out.last_hidden_state[0])

    def store(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> None:
        """As `run`, where nobody wants logits, here or elsewhere: a fused model's last layer only stores KV."""
        if self._fused is not None:
            self._fused.store(token_ids_T, positions_T, self.context.needed())
        else:
            self.run(token_ids_T, positions_T)

    def run_stage(
        self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, rows_TE: torch.Tensor | None, *, stores_only: bool = False
    ) -> torch.Tensor | None:
        """A stage's layers: from `rows_TE` as the stage before has left them (it may be written to), or from tokens in the
        first, to rows for the next.

        `stores_only`: in the last stage, where nobody wants logits. None: then there are no rows.
        """
        if rows_TE is not None:
            token_ids_T = torch.zeros_like(positions_T)  # of made-up embeddings, which are passed over
        if self._fused is not None:
            return self._fused.run_stage(token_ids_T, positions_T, rows_TE, self.context.needed(), stores_only=stores_only)
        self.context.rows_TE, self.context.is_stage = rows_TE, True
        try:
            out = self._base(input_ids=token_ids_T.unsqueeze(0), position_ids=positions_T.unsqueeze(0), use_cache=False)
        finally:
            self.context.rows_TE, self.context.is_stage = None, False
        self._output = type(out)
        rows: torch.Tensor = out.last_hidden_state[0]
        return rows

    def behind_stages(self, rows_TE: torch.Tensor) -> Hidden:
        """What `logits` takes, of rows as the last stage has left them."""
        return Hidden(rows_TE) if self._fused is not None else Hidden(self._base.norm(rows_TE))

    def logits(self, hidden: Hidden, rows_S: torch.Tensor) -> torch.Tensor:
        """Logits `[S, V]` of the chosen rows."""
        if self._fused is not None:
            return self._fused.logits(hidden, rows_S)
        # What a model does to its logits beside the head (scales, caps) stands in its forward: it runs with its layers' result
        # given.
        self.context.hidden = self._output(last_hidden_state=hidden.x_TE[rows_S].unsqueeze(0))
        try:
            out = self.module(input_ids=rows_S.unsqueeze(0), use_cache=False)
        finally:
            self.context.hidden = None
        return out.logits[0]  # type: ignore[no-any-return]

    def forward(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, logits_rows_S: torch.Tensor) -> torch.Tensor:
        """`run`, then the `logits` of the chosen rows."""
        return self.logits(self.run(token_ids_T, positions_T), logits_rows_S)

    def weight_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(p.numel() * p.element_size() for p in self.module.parameters())

    def layer_token_bytes(self) -> int:
        """Bytes of one token's KV in one layer, without scales."""
        return self.shape.layer_token_numbers * self.kv_format.dtype.itemsize

    def num_parameters(self) -> int:
        """Numbers that its weights are, however they are stored; scales of others aren't counted."""
        return sum(
            parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)  # packed
            for name, parameter in self.module.named_parameters()
            if not name.endswith(("weight_scale", "_scales"))
        )

    @property
    def row_bytes(self) -> int:
        """Bytes of a row between layers."""
        return self.hidden_size * self.shape.dtype.itemsize

    def token_bytes(self) -> int:
        """The same in all layers."""
        return self.num_layers * self.layer_token_bytes()

    def block_bytes(self, block_size: int) -> int:
        """Bytes of a block of so many tokens."""
        shape = self.shape
        return self.kv_format.block_bytes(
            num_layers=shape.layers_of_block(self.num_layers),
            parts=shape.parts,
            block_size=block_size,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
        )

    def make_storage(self, num_blocks: int, block_size: int) -> KVStorage:
        """A pool for its KV. Raises ValueError or MemoryError as `KVStorage`."""
        shape = self.shape
        return KVStorage(
            num_layers=shape.layers_of_block(self.num_layers),
            places=shape.places(self.num_layers),
            num_blocks=num_blocks,
            block_size=block_size,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            parts=shape.parts,
            format=self.kv_format,
            device=self.device,
        )

    def reach(self) -> int:
        """Tokens that a row attends to at the cost of the rest of the model.

        Its products are 2 x parameters operations, attention to a token 2 x heads x (head dim + dim of values) in each layer.
        """
        embeddings: Any = self.module.get_input_embeddings()
        rest = self.num_parameters() - embeddings.weight.numel()
        shape = self.shape
        return max(1, 2 * int(rest) // (2 * shape.num_heads * (shape.head_dim + shape.out_dim) * self.num_layers))

    def fingerprint(self) -> str:
        """SHA-256 over the config and, of every weight, its name, shape, type and 64 values: equal models, equal prints."""
        config = self.module.config.to_dict()
        for local in ("_name_or_path", "transformers_version", "dtype", "_attn_implementation"):
            config.pop(local, None)
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, weight in sorted(self.module.state_dict().items()):
            flat = weight.detach().reshape(-1)
            values = flat[:: max(1, flat.numel() // 64)][:64].double().cpu().tolist()
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {values}".encode())
        digest.update((self.rotary or "").encode())
        digest.update(b"latents" if self.shape.value_dim else b"")
        return digest.hexdigest()

    def _probe(self, max_context: int | None) -> AttentionShape:
        """Run two rows and look at what each attention layer is called with; bind the layers to `context`.

        Attention is 0 here, so a row must come out as it does alone: else something beside attention mixes rows (a state,
        a convolution), which a step that holds rows of many sequences would mix up.
        """
        seen: dict[int, list[Call]] = {}

        def probe(
            module: torch.nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: torch.Tensor | None = None,
            scaling: float | None = None,
            **extra: object,
        ) -> tuple[torch.Tensor, None]:
            refuse_arguments(extra, attention_mask)
            if getattr(module, "is_causal", True) is False:
                raise UnsupportedModel("the model's attention is not causal")
            layer = int(module.layer_idx)  # type: ignore[arg-type]
            module.distattn_context = self.context  # type: ignore[assignment]
            seen.setdefault(layer, []).append(call_of(query, key, value, scaling, extra))
            return torch.zeros_like(query)[..., : value.shape[3]].transpose(1, 2), None

        AttentionInterface.register(ATTENTION, probe)
        try:
            with torch.inference_mode():
                ids = torch.tensor([1, 2], device=self.device) % self.vocab_size
                places = torch.tensor([0, 1], device=self.device)
                together = self._as_transformers(ids, places)[1]
                refuse_calls(self.module, seen, self.num_layers)
                calls = [seen[layer][0] for layer in range(self.num_layers)]
                alone = self._as_transformers(ids[1:], places[1:])[0]
                halves = self.forward(ids, places, places)[1]
                sights = agreed_sights(calls, self._masked_by(max_context), max_context)
        except (UnsupportedModel, torch.OutOfMemoryError):
            raise
        except _FOREIGN_ERRORS as error:
            if not seen:
                raise UnsupportedModel(not_through_the_interface(self.module)) from error
            raise UnsupportedModel(
                f"{self.module.config.model_type}: its layers can't run rows without a mask and a cache "
                f"({type(error).__name__}: {str(error).splitlines()[0]})"
            ) from error
        finally:
            AttentionInterface.register(ATTENTION, _attention)
        if self.device.type != "meta":  # there nothing has a value
            self._refuse_mixing(together, alone, halves)
        self._calls = calls
        return whole_shape(calls, sights)

    def shape_within(self, size: int) -> AttentionShape:
        """The shape if windows and chunks were of `size` tokens at most: with `instance.sights.smaller`, to compare with.

        Raises UnsupportedModel if a layer's window or chunks don't follow from what the config says of them.
        """
        shape = self.shape
        with torch.inference_mode():
            sights = [sight or FULL for sight in self._masked_by(self.max_context)]
        for index, sight in enumerate(sights):
            true = shape.layer(index).sight
            smaller = Sight(min(true.window, size), min(true.chunk, size))
            if sight != smaller and true != FULL:
                raise UnsupportedModel(
                    f"{self.module.config.model_type}: with windows of {size} tokens in its config rows of layer {index} see "
                    f"by {sight}, not by {smaller}, so that its own can't be compared"
                )
        return replace(shape, layers=tuple(replace(shape.layer(i), sight=sight) for i, sight in enumerate(sights)), whole=())

    def _masked_by(self, max_context: int | None) -> list[Sight | None]:
        """What transformers' masks let rows see in each layer; None where it makes none.

        Raises UnsupportedModel for a mask that hides something else than what lies before a window or a chunk.
        """
        sights: list[Sight | None] = [None] * self.num_layers

        def look(
            module: torch.nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: torch.Tensor | None = None,
            **_: object,
        ) -> tuple[torch.Tensor, None]:
            layer = int(module.layer_idx)  # type: ignore[arg-type]
            rule = rules.of(attention_mask)
            if attention_mask is not None:
                sights[layer] = None if rule is None else rule.sight(max_context)
                if sights[layer] is None:
                    raise UnsupportedModel(
                        f"{self.module.config.model_type}: what rows of layer {layer} see is neither all before them, nor a "
                        "window or chunk of it"
                    )
            return torch.zeros_like(query)[..., : value.shape[3]].transpose(1, 2), None

        registered = ALL_ATTENTION_FUNCTIONS[ATTENTION]
        AttentionInterface.register(ATTENTION, look)
        try:
            with ruled_as(ATTENTION) as rules:
                ids_1T = torch.tensor([[1, 2]], device=self.device) % self.vocab_size
                places_1T = torch.tensor([[0, 1]], device=self.device)
                # with a mask of ours, which hides nothing, places are not looked at: on `meta` they have no values
                mask_1T = torch.ones_like(ids_1T)
                self.module(input_ids=ids_1T, position_ids=places_1T, attention_mask=mask_1T, use_cache=False)
        finally:
            AttentionInterface.register(ATTENTION, registered)
        return sights

    def _refuse_mixing(self, together: torch.Tensor, alone: torch.Tensor, halves: torch.Tensor) -> None:
        """Raises UnsupportedModel if a row's logits depend on another row beside it, or on how the model is cut in two."""
        if not relative(alone, together) <= TOLERANCE[self.module.dtype]:  # NaN is refused too
            raise UnsupportedModel(f"{self.module.config.model_type}: something beside attention mixes the rows of a step")
        if not relative(together, halves) <= TOLERANCE[self.module.dtype]:
            raise UnsupportedModel(f"{self.module.config.model_type}: its logits come from more than its last hidden states")

    def _as_transformers(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        """Logits `[T, V]` of the model run in one piece."""
        out = self.module(input_ids=token_ids_T.unsqueeze(0), position_ids=positions_T.unsqueeze(0), use_cache=False)
        return out.logits[0]  # type: ignore[no-any-return]


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: `[1, heads, T, D]` in, `[1, T, heads, D]` out."""
    context: AttentionContext = module.distattn_context  # type: ignore[assignment]
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    latents: LatentHeads | None = getattr(module, "distattn_latents", None)
    if latents is not None:
        q_THD, k_T1D = latents.absorb(query[0], key[0])
        out_THC = context.needed().run(layer, q_THD, k_T1D, k_T1D[..., : latents.dims.latent])
        return latents.values(out_THC).unsqueeze(0), None
    dim, value_dim = key.shape[3], value.shape[3]
    if value_dim < dim:  # blocks have one width
        value = torch.nn.functional.pad(value, (0, dim - value_dim))
    q_THD, k_TKD, v_TKD = (x[0].transpose(0, 1) for x in (query, key, value))
    out_THD = context.needed().run(layer, q_THD, k_TKD, v_TKD, s_aux)
    return out_THD[..., :value_dim].unsqueeze(0), None


def _unless_given(forward: Callable[..., Any], context: AttentionContext) -> Callable[..., Any]:
    """A decoder's `forward` that returns what its thread was given instead, if it was given anything."""

    @functools.wraps(forward)
    def wrapped(*args: object, **kwargs: object) -> Any:
        if context.hidden is not None:
            return context.hidden
        places = kwargs.get("position_ids")
        context.places_1T = places if isinstance(places, torch.Tensor) else None
        return forward(*args, **kwargs)

    return wrapped


def _decoder(module: PreTrainedModel) -> Any:
    """The layers without the head: also of a model that says it has none (Llama 4)."""
    base: Any = module.get_decoder()  # type: ignore[no-untyped-call]
    return getattr(module, "model", base) if base is module else base


def _of_whole(shape: AttentionShape, sights: tuple[Sight, ...], num_layers: int) -> AttentionShape:
    """The shape of a stage's layers, as those of a model in whose layers rows see that."""
    if set(sights) <= {FULL}:
        return shape
    return replace(shape, layers=tuple(map(shape.layer, range(num_layers))), whole=sights)


def _scale_by_place(module: PreTrainedModel, context: AttentionContext) -> None:
    """Let layers without rotary that scale queries by their place in the rows they are called with (Llama 4) do it by their
    place in the text, which is the same only for a text in one piece.

    Their queries are only projected before that, so it can be done there.
    """

    def hook(layer: Any) -> Callable[..., torch.Tensor]:
        def scaled(_module: object, _inputs: object, query_1TE: torch.Tensor) -> torch.Tensor:
            places = context.places_1T
            if places is None:
                places = torch.arange(query_1TE.shape[1], device=query_1TE.device)[None]
            scale_1T: torch.Tensor = (
                torch.log1p(torch.floor((places.float() + 1.0) / layer.floor_scale)) * layer.attn_scale + 1.0
            )
            return (query_1TE * scale_1T.unsqueeze(-1)).to(query_1TE.dtype)

        return scaled

    for layer in module.modules():
        if getattr(layer, "attn_temperature_tuning", False) and not getattr(layer, "use_rope", True):
            layer.attn_temperature_tuning = False  # type: ignore[assignment]
            projection: Any = layer.q_proj
            projection.register_forward_hook(hook(layer))


def register_attention() -> str:
    AttentionInterface.register(ATTENTION, _attention)
    return ATTENTION


def relative(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """The RMS of the difference of rows of logits `[..., V]`, about their means, by that of `want`."""
    got, want = got.float() - got.float().mean(-1, keepdim=True), want.float() - want.float().mean(-1, keepdim=True)
    size: torch.Tensor = want.norm(dim=-1).clamp_min(1e-30)
    difference: torch.Tensor = (got - want).norm(dim=-1)
    return difference / size
