"""A decoder's layers with merged projections and fused kernels, for models whose layers have the parts of Llama's or Gemma's.

    qkv = norm(x) Wqkv    x += attention(rotary(qkv)) Wo    gate_up = norm(x) Wgu    x += (silu(gate) * up) Wd

Whether a model is made like that is decided by the names of its parts (`instance.layers`) and by what its layers compute.

Shape suffixes: T rows, S rows whose logits are wanted, E hidden size, D head dim, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from distattn.shape import AttentionShape, PackedRows
from instance.layers import Dense, Layer, Mixture, norm_of, read_layers
from instance.quantised import matrix_of, plain_products
from instance.team import Team
from kernels.layer_ops import Norm, add_rms_norm, linear, rms_norm, uses_gemv
from kernels.products import Matrix, Quantised

_CHECK_IDS = (0, 1, 5, 77)
_CHECK_TURNS = 5
"""Rows at each place that is tried."""
_AGREEING_ROWS = 0.75
"""More than that: what is wrong at one place of four shows."""
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of what a layer adds to its input, relative RMS. Another rounding gives a tenth of it; another formula, ten times as much."""

Rotary = dict[str | None, tuple[torch.Tensor, torch.Tensor]]
"""Cosines and sines `[T, D]` of the rows, for each kind of layers."""


class PackedAttention(Protocol):
    """Attention of one layer's rows in the present step: the result is `[T, H, D]`."""

    def run_packed(self, layer: int, rows: PackedRows) -> torch.Tensor: ...

    def store_packed(self, layer: int, rows: PackedRows) -> None:
        """Keep the rows' keys and values, and attend to nothing."""


class LayerAttention(PackedAttention, Protocol):
    """The same for layers that run as transformers has them, too."""

    def run(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


class Summing(Protocol):
    """Who compute a part each of what layers add to rows."""

    def sum(self, part_TE: torch.Tensor, /) -> torch.Tensor:
        """Of all parts."""

    def add_rms_norm(
        self, part_TE: torch.Tensor, residual_TE: torch.Tensor, norm: Norm, /, *, first: Norm | None, backend: str
    ) -> torch.Tensor:
        """`kernels.layer_ops.add_rms_norm` of the sum."""


class FeedSharing(Summing, Protocol):
    """Other instances, which compute a part of the present step's feeds and head (`instance.shared_feeds`): of the rows of all,
    so a part is `[R, E]`. What is summed are the own rows."""

    def run(
        self, feed: Dense, x_TE: torch.Tensor, residual_TE: torch.Tensor, norm: Norm, *, first: Norm | None
    ) -> torch.Tensor:
        """This instance's part, new, of what a feed makes of all members' `kernels.layer_ops.add_rms_norm` of x. It is summed
        before anything else is asked."""

    def logits(self, head_NE: torch.Tensor, bias_N: torch.Tensor | None, h_TE: torch.Tensor) -> torch.Tensor:
        """Of the own rows."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """Rows after the last layer."""

    x_TE: torch.Tensor
    pending_TE: torch.Tensor | None = None
    """To be added."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """What a layer adds, which the next norm adds on its way."""

    x_TE: torch.Tensor
    """Or a part of it, where others have the rest."""
    norm: Norm | None
    """Of it, before it is added."""
    others: Summing | None
    """With whom it is summed up; None: it is whole."""


class FusedDecoder:
    """The layers of one model, from token ids to logits of chosen rows."""

    def __init__(
        self,
        module: PreTrainedModel,
        layers: list[Layer],
        final_norm: Norm,
        backend: str,
        max_context: int,
        team: Callable[[], Team | None],
        sharing: Callable[[], FeedSharing | None],
    ) -> None:
        """`layers`: of `instance.layers.read_layers`. `team`: of the ranks whose parts this and others are, in this thread.
        `sharing`: likewise, instances that have all weights and compute parts of the step that runs."""
        base: Any = module.get_decoder()  # type: ignore[no-untyped-call]
        self._module: Any = module
        self._embed: nn.Module = base.embed_tokens
        self._rotary: nn.Module = base.rotary_emb
        self._final_norm = final_norm
        self._head: Any = module.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._vocab_size: int = module.config.get_text_config().vocab_size
        self._soft_cap: float = getattr(module.config.get_text_config(), "final_logit_softcapping", None) or 0.0
        self._backend = backend
        self._team = team
        self._sharing = sharing
        # the last place, too: some models scale what stands far back
        self._check_positions = sorted({min(place, max_context - 1) for place in (0, 1, 5, max_context - 1)})
        self._layers = layers
        self._halves = self._has_halves()

    @staticmethod
    def of(
        module: PreTrainedModel,
        backend: str,
        max_context: int,
        team: Callable[[], Team | None],
        sharing: Callable[[], FeedSharing | None],
    ) -> "FusedDecoder | None":
        """Of a model that `has_known_parts`, whose weights are merged; None if what they compute is of no known kind."""
        base: Any = module.get_decoder()  # type: ignore[no-untyped-call]
        final_norm = norm_of(base.norm)
        layers = None if final_norm is None else read_layers(module)
        if final_norm is None or layers is None:
            return None
        return FusedDecoder(module, layers, final_norm, backend, max_context, team, sharing)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def feeds(self) -> list[Dense | Mixture]:
        """Of each layer."""
        return [layer.feed for layer in self._layers]

    @property
    def can_share(self) -> bool:
        """Whether feeds and head can be split between instances: they are dense, with weights of 16 or 32 bits."""
        matrices = [matrix_of(self._head), *(matrix for feed in self.feeds() for matrix in feed.matrices())]
        return all(isinstance(feed, Dense) for feed in self.feeds()) and not any(isinstance(m, Quantised) for m in matrices)

    @property
    def num_logits(self) -> int:
        """Of a row: of all tokens that the head knows."""
        return matrix_of(self._head).shape[0]

    def blank_rows(self, num_rows: int) -> torch.Tensor:
        """Rows between layers, of zeros."""
        embeddings_VE = self._embeddings()
        return embeddings_VE.new_zeros((num_rows, embeddings_VE.shape[1]))

    def run_dense(self, h_TE: torch.Tensor) -> None:
        """All feeds and the head, of rows that mean nothing: to see how long that takes."""
        for feed in self.feeds():
            feed.run(h_TE, None, self._backend)
        self._logits_of(h_TE)

    def help(self, attend: Callable[[int], None]) -> None:
        """Compute parts of others' rows, with none of our own, behind each layer's `attend`. Needs others to share with."""
        rows_0E = self.blank_rows(0)
        for index, layer in enumerate(self._layers):
            attend(index)
            fed = self._share(layer, rows_0E, rows_0E)
            if fed is not None:
                self._whole(fed)
        self._logits_of(rows_0E)

    def matrices(self) -> list[Matrix]:
        """All that a step multiplies with, `[out, in]`, in order."""
        layers = [matrix for layer in self._layers for matrix in (layer.qkv, layer.out, *layer.feed.matrices())]
        return [*layers, matrix_of(self._head)]

    def run(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, attention: PackedAttention) -> Hidden:
        """All layers."""
        x_TE, pending, _ = self._run_layers(self._layers, self._embed(token_ids_T), positions_T, attention)
        return Hidden(x_TE, None if pending is None else self._whole(pending))

    def store(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, attention: PackedAttention) -> None:
        """All layers, but of the last only what makes its keys and values."""
        self._store(self._embed(token_ids_T), positions_T, attention)

    def _store(self, x_TE: torch.Tensor, positions_T: torch.Tensor, attention: PackedAttention) -> None:
        *before, last = self._layers
        x_TE, pending, rotary = self._run_layers(before, x_TE, positions_T, attention)
        attention.store_packed(len(before), self._project(last, x_TE, pending, rotary))

    def run_stage(
        self,
        token_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        rows_TE: torch.Tensor | None,
        attention: PackedAttention,
        *,
        stores_only: bool,
    ) -> torch.Tensor | None:
        """All layers of a stage, as `instance.model.Model.run_stage`."""
        x_TE = self._embed(token_ids_T) if rows_TE is None else rows_TE
        if stores_only:
            self._store(x_TE, positions_T, attention)
            return None
        x_TE, pending, _ = self._run_layers(self._layers, x_TE, positions_T, attention)
        return x_TE if pending is None else x_TE.add_(self._whole(pending))

    def logits(self, hidden: Hidden, rows_S: torch.Tensor) -> torch.Tensor:
        """Logits `[S, V]` of the chosen rows."""
        x_SE = hidden.x_TE[rows_S]
        if hidden.pending_TE is not None:
            x_SE = x_SE + hidden.pending_TE[rows_S]
        return self._logits_of(x_SE, self._final_norm)

    def agrees(self, attention: PackedAttention) -> bool:
        """Whether every layer adds to random rows what transformers' own layer adds, up to rounding.

        transformers' layers must be bound to `attention`: `OwnRow` shows a mistake in queries, keys and values alike.
        """
        embeddings_VE = self._embeddings()
        positions_T = torch.tensor(self._check_positions * _CHECK_TURNS, device=embeddings_VE.device)
        seeded = torch.Generator().manual_seed(0)  # all instances of a cell must come to the same answer
        x_TE = torch.randn(len(positions_T), embeddings_VE.shape[1], generator=seeded).to(embeddings_VE)
        rotary = self._rotary_of(x_TE, positions_T)
        for index, layer in enumerate(self._layers):
            cos_TD, sin_TD = self._factors_of(x_TE, positions_T, layer.rotary)
            with plain_products(layer.module):
                theirs: Any = layer.module(
                    x_TE.unsqueeze(0),
                    position_embeddings=(cos_TD.unsqueeze(0), sin_TD.unsqueeze(0)),
                    position_ids=positions_T.unsqueeze(0),
                    attention_mask=None,
                )
            want_TE = theirs[0].float() - x_TE.float()
            ours_TE = x_TE.clone()
            pending = self._run_layer(index, layer, ours_TE, None, rotary, attention)
            added_TE = ours_TE.float() - x_TE.float()
            if pending is not None:
                added_TE += self._whole(pending)
            may_choose = isinstance(layer.feed, Mixture) and x_TE.dtype != torch.float32
            if not (self._rows_agree(added_TE, want_TE) if may_choose else self._agree(added_TE, want_TE)):
                return False
        return True

    def ends_agree(self) -> bool:
        """Whether transformers too does nothing to embeddings, and nothing to logits after the last norm and the head."""
        base = self._module.get_decoder()
        ids_T = torch.tensor(_CHECK_IDS, device=self._head.weight.device) % len(self._head.weight)
        x_TE: torch.Tensor = self._embed(ids_T)
        layers, norm = base.layers, base.norm
        base.layers = nn.ModuleList()
        try:
            with plain_products(self._module):
                with_norm_TV = self._module(input_ids=ids_T.unsqueeze(0), use_cache=False).logits[0]
                base.norm = nn.Identity()  # which would hide another scale of the embeddings
                without_TV = self._module(input_ids=ids_T.unsqueeze(0), use_cache=False).logits[0]
        finally:
            base.layers, base.norm = layers, norm
        ours_TV = self.logits(Hidden(x_TE), torch.arange(len(ids_T), device=ids_T.device))
        return self._agree(ours_TV, with_norm_TV) and self._agree(self._logits_of(x_TE), without_TV)

    def _rows_agree(self, got_TE: torch.Tensor, want_TE: torch.Tensor) -> bool:
        """Whether most rows agree: rounding may choose between two experts."""
        agree = [self._agree(got_E, want_E) for got_E, want_E in zip(got_TE, want_TE, strict=True)]
        return sum(agree) > _AGREEING_ROWS * len(agree)

    def _agree(self, got: torch.Tensor, want: torch.Tensor) -> bool:
        return bool((got.float() - want.float()).norm() <= _TOLERANCE[self._embeddings().dtype] * want.float().norm())

    def _embeddings(self) -> torch.Tensor:
        """Of the type that rows have, which is not every matrix's."""
        weight_VE: torch.Tensor = self._embed.weight  # type: ignore[assignment]
        return weight_VE

    def _logits_of(self, x_SE: torch.Tensor, norm: Norm | None = None) -> torch.Tensor:
        """Of rows, or of their norm."""
        head_NE = matrix_of(self._head)
        if (sharing := self._sharing()) is not None and not isinstance(head_NE, Quantised):
            h_SE = x_SE if norm is None else rms_norm(x_SE, norm, backend=self._backend)
            logits_SV = sharing.logits(head_NE, self._head.bias, h_SE)
        else:
            logits_SV = linear(x_SE, head_NE, self._head.bias, norm=norm, backend=self._backend)
        if (team := self._team()) is not None:
            logits_SV = team.gather(logits_SV)[:, : self._vocab_size]
        return torch.tanh(logits_SV / self._soft_cap) * self._soft_cap if self._soft_cap else logits_SV

    def _run_layers(
        self, layers: list[Layer], x_TE: torch.Tensor, positions_T: torch.Tensor, attention: PackedAttention
    ) -> tuple[torch.Tensor, _Pending | None, Rotary]:
        """The rows after the first layers, in place; what is to be added to them, and their rotary factors for more."""
        rotary = self._rotary_of(x_TE, positions_T)
        pending = None
        for index, layer in enumerate(layers):
            pending = self._run_layer(index, layer, x_TE, pending, rotary, attention)
        return x_TE, pending, rotary

    def _rotary_of(self, x_TE: torch.Tensor, positions_T: torch.Tensor) -> Rotary:
        found: Rotary = {}
        for kind in dict.fromkeys(layer.rotary for layer in self._layers):
            cos_TD, sin_TD = self._factors_of(x_TE, positions_T, kind)
            if self._halves:
                cos_TD, sin_TD = torch.cat((cos_TD, cos_TD), -1), torch.cat((sin_TD, sin_TD), -1)
            found[kind] = cos_TD, sin_TD
        return found

    def _factors_of(self, x_TE: torch.Tensor, positions_T: torch.Tensor, kind: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary factors as the model's own layers take them."""
        cos_1TD, sin_1TD = self._rotary(x_TE, positions_T.unsqueeze(0), *(() if kind is None else (kind,)))
        return cos_1TD[0], sin_1TD[0]

    def _has_halves(self) -> bool:
        """Whether the model's rotary factors are those of half of the dims, with which the other half shares them."""
        first = self._layers[0]
        embeddings_VE = self._embeddings()
        positions_T = torch.tensor(self._check_positions, device=embeddings_VE.device)
        cos_TD, _ = self._factors_of(embeddings_VE[:1], positions_T, first.rotary)
        return not torch.equal(*cos_TD.chunk(2, -1))

    def _run_layer(
        self,
        index: int,
        layer: Layer,
        x_TE: torch.Tensor,
        pending: _Pending | None,
        rotary: Rotary,
        attention: PackedAttention,
    ) -> _Pending | None:
        """Adds the layer to `x_TE` in place, but for what it returns."""
        backend, team = self._backend, self._team()
        rows = self._project(layer, x_TE, pending, rotary)
        out_TE = attention.run_packed(index, rows).view(len(x_TE), -1)
        is_shared = self._sharing() is not None
        if team is None and not is_shared and layer.attention_norm is None and uses_gemv(len(x_TE), layer.out, backend):
            # the sum rides along with the product, and the norm with the one behind it
            linear(out_TE, layer.out, layer.out_bias, residual_TN=x_TE, backend=backend)
            h_TE, norm = x_TE, layer.feed_input_norm
        else:
            added_TE = linear(out_TE, layer.out, layer.out_bias, backend=backend)
            if (shared := self._share(layer, added_TE, x_TE)) is not None:
                return shared
            h_TE, norm = self._add_norm(_Pending(added_TE, layer.attention_norm, team), x_TE, layer.feed_input_norm), None
        fed_TE = layer.feed.run(h_TE, x_TE if team is None and layer.feed_norm is None else None, backend, norm)
        return None if fed_TE is None else _Pending(fed_TE, layer.feed_norm, team)

    def _share(self, layer: Layer, added_TE: torch.Tensor, x_TE: torch.Tensor) -> _Pending | None:
        """The layer's feed behind what attention adds to `x`, which it does; None, and nothing done, if it isn't shared."""
        sharing = self._sharing()
        if sharing is None or not isinstance(layer.feed, Dense):
            return None
        part_RE = sharing.run(layer.feed, added_TE, x_TE, layer.feed_input_norm, first=layer.attention_norm)
        return _Pending(part_RE, layer.feed_norm, sharing)

    def _project(self, layer: Layer, x_TE: torch.Tensor, pending: _Pending | None, rotary: Rotary) -> PackedRows:
        """The layer's rows, before attention. Adds what is pending to `x_TE`."""
        if pending is None:
            h_TE, norm = x_TE, layer.input_norm
        else:
            h_TE, norm = self._add_norm(pending, x_TE, layer.input_norm), None
        qkv_TE = linear(h_TE, layer.qkv, layer.qkv_bias, norm=norm, backend=self._backend)
        return PackedRows(qkv_TE, *rotary[layer.rotary], layer.q_norm, layer.k_norm, layer.sinks_H)

    def _add_norm(self, pending: _Pending, residual_TE: torch.Tensor, norm: Norm) -> torch.Tensor:
        """`kernels.layer_ops.add_rms_norm` of what is pending."""
        add = add_rms_norm if pending.others is None else pending.others.add_rms_norm
        return add(pending.x_TE, residual_TE, norm, first=pending.norm, backend=self._backend)

    def _whole(self, pending: _Pending) -> torch.Tensor:
        """What is added to the rows in the end."""
        x_TE = pending.x_TE if pending.others is None else pending.others.sum(pending.x_TE)
        return x_TE if pending.norm is None else rms_norm(x_TE, pending.norm, backend=self._backend)


class OwnRow:
    """Attention of each row to itself alone, and not by softmax: the sum of its query, key, value and sink."""

    def __init__(self, shape: AttentionShape, backend: str) -> None:
        self._shape = shape
        self._backend = backend

    def run(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        out_THD = q_THD + (k_TKD + v_TKD).repeat_interleave(self._shape.num_heads // self._shape.num_kv_heads, 1)
        return out_THD if sinks_H is None else out_THD + sinks_H.unsqueeze(-1)

    def run_packed(self, layer: int, rows: PackedRows) -> torch.Tensor:
        num_rows = rows.qkv_TE.shape[0]
        kv_21TKD = rows.qkv_TE.new_empty((2, 1, num_rows, self._shape.num_kv_heads, self._shape.head_dim))
        slots_T = torch.arange(num_rows, device=rows.qkv_TE.device)
        q_THD = rows.rotate_and_store(self._shape.num_heads, kv_21TKD, slots_T, self._backend)
        return self.run(layer, q_THD, kv_21TKD[0, 0], kv_21TKD[1, 0], rows.sinks_H)

    def store_packed(self, layer: int, rows: PackedRows) -> None:
        """Nothing is kept."""
