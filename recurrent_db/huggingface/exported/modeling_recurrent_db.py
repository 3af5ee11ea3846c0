"""A looped language model for Hugging Face transformers: prelude -> core x K -> coda.

    tokens --embed, prelude--> e                         once
    state_0 --core(inject(state, e))--> ... state_K      K times: `num_recurrence`
    state_K --final norm, coda, final norm--> hidden     once
    hidden --embedding matrix--> logits

The architecture is Huginn's (arXiv:2502.05171). With ``config.layer`` llama or neox, the embedding is not scaled and the
final norm is used only before the head. K is ``config.num_recurrence``, or an argument of ``forward`` and
``generate``. ``config.initial_state`` is the start of the K iterations:

- ``zeros``;
- ``random``: a truncated normal, as in Huginn's training;
- ``noise``: the iterations are a reverse diffusion over K noise levels (arXiv:2506.14202). K = 1 is the read-out at the
  highest level.

The noise of a random start depends only on ``config.seed`` and the position. All rows of a batch share it, so batches,
beams, padding and caches do not change results. ``recurrent_db.generate`` has the same noise for request 0 and this seed.

Every iteration has its own keys and values. The cache therefore has one layer for each visit to a block, and must be able
to grow (`DynamicCache`). A cache works for one K only.

Shapes: B rows, T positions of a pass, S positions so far, D width, H heads, E head size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_recurrent_db import RecurrentDBConfig
from .layers_recurrent_db import Block, Core, Noise, NoiseEmbedding, Pass, build_norm, noise_levels, wide

# Name of the cache in the output; it depends on the version of transformers.
CACHE = "cache" if "cache" in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"

# Other arguments that `forward` accepts: those of transformers' loss, and those that `generate` passes on without need.
LOSS_ARGUMENTS = ("num_items_in_batch", "shift_labels", "ignore_index")
UNUSED = ("cache_position", "tokenizer", "assistant_tokenizer")


class RecurrentDBForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model. The module's docstring describes it."""

    config_class = RecurrentDBConfig
    base_model_prefix = ""
    _no_split_modules = ["Block", "Core"]  # noqa: RUF012
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config: RecurrentDBConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.prelude = nn.ModuleList(Block(config) for _ in range(config.n_prelude))
        self.core = Core(config)
        self.coda = nn.ModuleList(Block(config) for _ in range(config.n_coda))
        self.final_norm = build_norm(config)
        self.head = None if config.tied else nn.Linear(width, config.vocab_size, bias=False)
        features = config.noise_features
        self.noise_embedding = NoiseEmbedding(width, config.n_core, features) if features else None
        self.noise = Noise(config.seed, config.max_position_embeddings)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding = value

    def get_output_embeddings(self) -> nn.Linear | None:
        return self.head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.head = value

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. A prompt without tokens begins after an end-of-text token, like every text in training.

        If all prompts are empty, the result holds the new tokens alone. In a padded batch, the end-of-text token takes the
        place of an empty prompt's last padding.
        """
        prompts = kwargs.pop("input_ids", None) if inputs is None else inputs
        mask = kwargs.get("attention_mask")
        if prompts is not None and "inputs_embeds" not in kwargs:
            if prompts.shape[1] == 0:
                # After padding, because transformers 4 gives the model a single embedding again in each step.
                start_B2 = torch.full((len(prompts), 2), self.config.bos_token_id, device=self.device)
                kwargs["inputs_embeds"] = self.embedding(start_B2).detach()
                kwargs["attention_mask"] = torch.tensor([0, 1], device=self.device).repeat(len(prompts), 1)
                # Versions of transformers differ in whether max_length counts embeddings.
                length = kwargs.pop("max_length", None)
                if length is not None and kwargs.get("max_new_tokens") is None:
                    kwargs["max_new_tokens"] = length
                prompts = None
            elif mask is not None and not bool(mask.any(-1).all()):
                empty_B = ~mask.any(-1)
                prompts, kwargs["attention_mask"] = prompts.clone(), mask.clone()
                prompts[empty_B, -1], kwargs["attention_mask"][empty_B, -1] = self.config.bos_token_id, 1
        return super().generate(prompts, *args, **kwargs)

    def encode(self, embeds_BTD: Tensor, here: Pass) -> Tensor:
        """Prelude: the context e, (B, T, D)."""
        x_BTD = embeds_BTD * math.sqrt(self.config.hidden_size) if self.config.layer == "huginn" else embeds_BTD
        if here.outputs is not None:
            here.outputs.append(x_BTD)
        for block in self.prelude:
            x_BTD = here.run(block, x_BTD)
        return x_BTD

    def decode(self, state_BTD: Tensor, here: Pass) -> Tensor:
        """Final norm (of Huginn's layers), coda, final norm: the hidden vectors for the head, (B, T, D)."""
        x_BTD = self.final_norm(state_BTD) if self.config.layer == "huginn" else state_BTD
        for block in self.coda:
            x_BTD = here.run(block, x_BTD)
        return self.final_norm(x_BTD)

    def read_out(self, hidden: Tensor) -> Tensor:
        """Logits (..., V)."""
        return F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)

    def recur(self, e_BTD: Tensor, k: int, here: Pass) -> Tensor:
        """K core iterations, then the read-out's hidden vectors. The state starts from zeros or from a random normal with
        standard deviation sqrt(2/5), truncated at three of them."""
        state = torch.zeros_like(e_BTD)
        if self.config.initial_state == "random":
            tail = 0.0013498980316301  # Phi(-3)
            u = self.noise(here.positions_BT, e_BTD.shape[-1], "state", normal=False)
            state = (math.sqrt(2 / 5) * torch.special.ndtri(tail + u * (1 - 2 * tail))).to(e_BTD.dtype)
        for _ in range(k):
            state = self.core(state, e_BTD, here)
        return self.decode(state, here)

    def walk(self, e_BTD: Tensor, k: int, here: Pass) -> Tensor:
        """Reverse diffusion over K noise levels. Each position moves its own z from noise towards the embedding of the next
        token. A level is one conditioned pass of the core. Before the last level, a bridge turns its read-out into the
        estimate that the step moves towards. Uses EDM's scalings (arXiv:2206.00364)."""
        law, embed_noise = self.config.walk, self.noise_embedding
        sd = law["sd"]
        assert embed_noise is not None
        z = self.noise(here.positions_BT, e_BTD.shape[-1], "noise", normal=True) * law["sigma_max"]
        for level, following in itertools.pairwise([*noise_levels(law, k), 0.0]):
            sigma = torch.full((len(z), 1, 1), level, dtype=torch.float32, device=z.device)
            mute = 1 / (1 + sigma**2) if law["mute"] else 1.0
            view = torch.rsqrt(sigma**2 + sd**2) * mute * z
            modulation = embed_noise(sigma[..., 0].log() / 4)
            state = self.core(view.to(e_BTD.dtype), e_BTD, here, modulation)
            c_skip, c_out = sd**2 / (sigma**2 + sd**2), sigma * sd * torch.rsqrt(sigma**2 + sd**2)
            estimate = c_skip * z + c_out * state.to(wide(state.dtype))
            if following:
                ratio = following / level
                z = ratio * z + (1 - ratio) * self._bridge(estimate, here)
        return self.decode((estimate / sd).to(e_BTD.dtype), here)

    def _bridge(self, estimate: Tensor, here: Pass) -> Tensor:
        """The estimate that a step moves towards, (B, T, D): the core's own (state), or the expected (soft) or most likely
        (hard) normalised target under its read-out."""
        law = self.config.walk
        if law["bridge"] == "state":
            return estimate
        outputs, here.outputs = here.outputs, None  # the blocks of this read-out are no part of the model's depth
        logits_BTV = self.read_out(self.decode((estimate / law["sd"]).to(self.embedding.weight.dtype), here))
        here.outputs = outputs
        table_VD = self.embedding.weight
        rows = table_VD if law["bridge"] == "soft" else table_VD[logits_BTV.argmax(-1)]
        rows = F.normalize(rows.to(wide(rows.dtype)), dim=-1)
        return logits_BTV.to(rows.dtype).softmax(-1) @ rows if law["bridge"] == "soft" else rows

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_recurrence: int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits for the token after each position.

        Args:
            input_ids: int64 (B, T).
            attention_mask: 1 for tokens and 0 for padding, over all positions so far, (B, S).
            position_ids: int64 (B, T). By default counted from the first token of each row.
            cache: keys and values of the earlier positions. Older versions of transformers call it ``past_key_values``.
            inputs_embeds: rows of the embedding matrix, (B, T, D), instead of ``input_ids``.
            labels: int64 (B, T). They are shifted here; -100 is ignored.
            use_cache: whether to make a cache if none is given; in training by default not, otherwise ``config.use_cache``.
            output_attentions: refused, because attention weights are never computed as such.
            output_hidden_states: whether to return the embeddings and the output of each block in the order in which the
                blocks run, K times for the core's; the last one is the head's input. 1 + n_prelude + K n_core + n_coda
                tensors (B, T, D).
            return_dict: whether to return an object instead of a tuple; ``config.return_dict`` by default.
            logits_to_keep: number of last positions to return, where 0 returns all; or the positions, int64 (N,).
            num_recurrence: number of core iterations K; ``config.num_recurrence`` by default.
            kwargs: ``num_items_in_batch``, ``shift_labels`` and ``ignore_index`` of transformers' loss.

        Raises:
            TypeError: an argument is unknown.
            ValueError: an argument is not supported, or does not fit the others.
        """
        config, past = self.config, past_key_values if cache is None else cache
        k = config.num_recurrence if num_recurrence is None else num_recurrence
        logits_to_keep = 0 if logits_to_keep is None else logits_to_keep
        self._check(k, input_ids, inputs_embeds, past, labels, logits_to_keep, output_attentions, kwargs)
        checkpoint = None
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if past is not None:
                raise ValueError("gradient checkpointing works without a cache only")
            checkpoint, use_cache = self._gradient_checkpointing_func, False
        if past is None and (config.use_cache and not self.training if use_cache is None else use_cache):
            past = DynamicCache()
        embeds_BTD = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        here = self._pass(embeds_BTD.shape[:2], attention_mask, position_ids, past, embeds_BTD.device)
        here.checkpoint = checkpoint
        if config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            here.outputs = []
        e_BTD = self.encode(embeds_BTD, here)
        hidden_BTD = (self.walk if config.initial_state == "noise" else self.recur)(e_BTD, k, here)
        if past is not None:
            visits = next(here.visits)
            if here.total > here.length and getattr(past, "visits", visits) != visits:
                raise ValueError("this cache was made with another K")
            past.visits = visits
        keep = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.read_out(hidden_BTD[:, keep])
        loss = None
        if labels is not None:
            options = {name: kwargs[name] for name in LOSS_ARGUMENTS if name in kwargs}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=config.vocab_size, **options)
        states = None if here.outputs is None else (*here.outputs[:-1], hidden_BTD)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=states, **{CACHE: past})
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _check(
        self,
        k: int,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        past: Any,
        labels: Tensor | None,
        logits_to_keep: int | Tensor,
        output_attentions: bool | None,
        others: dict[str, Any],
    ) -> None:
        """Raise an error for arguments of `forward` that are unknown, not supported, or do not fit together."""
        for name, value in others.items():
            if value is not None and name not in (*LOSS_ARGUMENTS, *UNUSED):
                raise TypeError(f"this model has no argument {name}")
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions: this model's attention (SDPA) does not return its weights")
        if not isinstance(k, int) or k < 1:
            raise ValueError(f"num_recurrence must be a whole number of 1 or more, got {k!r}")
        if isinstance(logits_to_keep, int) and logits_to_keep < 0:
            raise ValueError(f"logits_to_keep must be 0 or more, or a tensor of positions, got {logits_to_keep}")
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give either input_ids or inputs_embeds")
        if given.dim() != (2 if inputs_embeds is None else 3):
            raise ValueError(
                f"input_ids need shape (batch, positions), inputs_embeds one more: got {tuple(given.shape)}"
            )
        if 0 in given.shape[:2]:
            raise ValueError(f"the input is empty: begin a text with bos_token_id = {self.config.bos_token_id}")
        if past is not None and (not hasattr(past, "get_seq_length") or getattr(past, "is_compileable", False)):
            raise ValueError(f"this model needs a cache that grows (DynamicCache), got {type(past).__name__}")
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels need the logits of all positions: leave logits_to_keep out")

    def _pass(
        self, shape: torch.Size, mask_BS: Tensor | None, positions: Tensor | None, past: Any, device: torch.device
    ) -> Pass:
        """The forward pass over ``shape`` = (B, T) positions after those in the cache."""
        seen = past.get_seq_length() if past is not None else 0
        if mask_BS is not None and tuple(getattr(mask_BS, "shape", ())) != (shape[0], seen + shape[1]):
            raise ValueError(
                f"attention_mask must have shape (batch, positions so far) = {(shape[0], seen + shape[1])}: 1 for tokens and"
                " 0 for padding"
            )
        if positions is not None and positions.shape[-1] != shape[1]:
            raise ValueError(f"position_ids must have {shape[1]} positions as the input has, got {positions.shape[-1]}")
        if positions is not None and mask_BS is None and bool((positions.diff() < 1).any()):
            raise ValueError("position_ids start anew within a row: pad sequences instead of packing them")
        if mask_BS is not None and bool(mask_BS.all()):
            mask_BS = None
        if positions is None and mask_BS is not None:
            positions = (mask_BS.long().cumsum(-1) - 1).clamp(min=0)[:, -shape[1] :]
        elif positions is None:
            positions = torch.arange(seen, seen + shape[1], device=device)
        return Pass(positions.expand(shape).long(), mask_BS, seen, past, self.config)
