"""Ties the halves together: validates prompts, keeps a step in flight, and turns tokens into results."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

import numpy as np

from jpaged.config import EngineConfig
from jpaged.contract.plan import StepPlan, TokenScores
from jpaged.device.runner import ModelRunner, StepUnderWay
from jpaged.engine.detokenizer import Detokenizer, Tokenizer
from jpaged.host.blocks.manager import BlockManager
from jpaged.host.scheduler import Scheduler
from jpaged.host.sequence import Sequence as Seq
from jpaged.host.sequence import SequenceGroup
from jpaged.interrupts import InterruptsWait
from jpaged.request import (
    CompletionDelta,
    CompletionOutput,
    FinishReason,
    Logprob,
    Request,
    RequestOutput,
    SamplingParams,
)


class TextPrompt(TypedDict):
    """A prompt given as text. Prompts share cached KV only if their ``cache_salt`` is equal or both have none."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt given as token ids; ``cache_salt`` as in ``TextPrompt``."""

    prompt_token_ids: list[int]
    cache_salt: NotRequired[str]


Prompt = str | TextPrompt | TokensPrompt


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step brought: the gains of each completion of a streamed request, and the requests that ended."""

    deltas: list[CompletionDelta] = field(default_factory=list)
    finished: list[RequestOutput] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The state of the pools, and counters since the start.

    Args:
        num_blocks: device blocks that can be handed out.
        num_used_blocks, num_shared_blocks: held by one sequence (or pin) or more; by two or more.
        num_cached_blocks: in the prefix cache, held or not.
        tokens_held: slots that hold a token of a running sequence, each counted once.
        internal_waste_percent: slots of used blocks that hold no token.
        saved_by_sharing_percent: blocks saved / blocks needed without sharing, over all steps so far (section 6.3).
        num_copies_on_write: blocks copied because a sequence was about to write to one that others, or the prefix
            cache, rely on.
        num_waiting, num_running: requests, and prefixes on their way to be pinned.
        num_pinned_prefixes: prefixes that stay in the pool, or will once they are computed.
        num_preemptions: requests preempted, each time counted.
        num_swaps_out, num_swaps_in: those of them moved to the host pool, and back.
        bytes_to_host, bytes_from_host: moved between the pools, for swaps and for the prefix cache.
        transfer_stalled_s: seconds that steps waited for such copies.
        num_host_blocks: blocks of the host pool.
        num_host_used_blocks, num_host_cached_blocks: held by preempted requests; in the prefix cache.
        prefix_cache_hit_rate: fraction of admitted tokens whose KV came from the prefix cache, either tier.
        host_cache_hit_tokens: those of them that came from the host pool.
        num_steps: steps planned, those of a burst each counted.
    """

    num_blocks: int
    num_used_blocks: int
    num_shared_blocks: int
    num_cached_blocks: int
    tokens_held: int
    internal_waste_percent: float
    saved_by_sharing_percent: float
    num_copies_on_write: int
    num_waiting: int
    num_running: int
    num_pinned_prefixes: int
    num_preemptions: int
    num_swaps_out: int
    num_swaps_in: int
    bytes_to_host: int
    bytes_from_host: int
    transfer_stalled_s: float
    num_host_blocks: int
    num_host_used_blocks: int
    num_host_cached_blocks: int
    prefix_cache_hit_rate: float
    host_cache_hit_tokens: int
    num_steps: int


@dataclass(slots=True)
class _Progress:
    """How far a sequence was read, and told of by its deltas: of how many tokens, with its prompt, and characters."""

    detokenizer: Detokenizer | None
    num_tokens: int
    num_characters: int = 0
    is_ended: bool = False


class Engine:
    """Serves requests over one model and one KV cache. Owns no policy: the scheduler decides, the runner executes.

    Args:
        runner: the device half, ready.
        config: the settings it was built with, or any that ask for no more blocks, rows and tokens.
        tokenizer: text <-> token ids; None serves token ids only.

    Raises:
        ValueError: a block size other than the runner's.
    """

    def __init__(self, runner: ModelRunner, config: EngineConfig, tokenizer: Tokenizer | None = None):
        if config.block_size != runner.config.block_size:
            raise ValueError(
                f"block_size={config.block_size} is not the runner's {runner.config.block_size}: give that"
            )
        self.runner = runner
        self.config = config
        self.tokenizer = tokenizer
        self.model_config = runner.model_config
        num_host_blocks = runner.num_host_blocks
        if config.num_host_blocks is not None:
            num_host_blocks = min(config.num_host_blocks, num_host_blocks)
        if config.host_memory_bytes is not None:
            num_host_blocks = min(config.host_memory_bytes // runner.host_bytes_per_block, num_host_blocks)
        if config.preemption == "swap" and num_host_blocks == 0:
            raise ValueError("preemption='swap' needs a host pool, and the runner has none: build it with one")
        if num_host_blocks and config.preemption == "auto" and runner.costs is None:
            runner.measure_costs()
        self.blocks = BlockManager(
            min(config.num_blocks or runner.num_blocks, runner.num_blocks),
            config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
            num_host_blocks=num_host_blocks,
        )
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.token_budget,
            max_model_len=runner.max_model_len,
            eos_token_ids=runner.model_config.eos_token_ids,
            max_burst=min(config.max_burst or runner.max_burst, runner.max_burst),
            step_sizes=[(size.num_tokens, size.num_rows) for size in runner.buckets if not size.is_decode],
            preemption=config.preemption,
            costs=runner.costs,
        )
        self._groups: dict[str, SequenceGroup] = {}  # requests whose result was not handed out, by request id
        self._streamed: dict[str, bool] = {}  # of those whose deltas are wanted: as they gain tokens, or in the end
        self._to_collect: dict[str, SequenceGroup] = {}  # those that may have something to tell, by request id
        self._output = StepOutput()  # what ``take`` will hand out
        self._progress: dict[int, _Progress] = {}  # of the sequences of ``_groups``, by sequence id
        self._random = np.random.default_rng(config.seed)
        self._under_way: list[StepUnderWay] = []  # oldest first

    # Requests -----------------------------------------------------------------------------------------------------

    def make_request(
        self, request_id: str, prompt: Prompt, params: SamplingParams | None = None, priority: int = 0
    ) -> Request:
        """Check a prompt and its parameters against this engine. Changes nothing.

        Args:
            request_id: unique among unfinished requests.
            prompt: text or token ids.
            params: how to generate.
            priority: lower is served first and preempted last.

        Raises:
            ValueError: a prompt that is empty, too long or out of the vocabulary; parameters that can never be met.
        """
        params = params or SamplingParams()
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params is a {type(params).__name__}: expected SamplingParams")
        if not isinstance(priority, int) or isinstance(priority, bool):
            raise ValueError(f"priority={priority!r} is not valid: expected an integer, lower is served first")
        text, token_ids, salt = self._encode(prompt)
        self._check_token_ids(params)
        if params.stop_strings and self.tokenizer is None:
            raise ValueError(f"stop={params.stop!r} needs a tokenizer, and this model has none: use stop_token_ids")
        request = Request(request_id, text, token_ids, params, params.seed, salt, priority)
        self.scheduler.check(request)
        return request

    def add(self, request: Request, *, is_streamed: bool = True) -> None:
        """Queue a request made by ``make_request``; draws its seed if it has none.

        Args:
            request: what to complete.
            is_streamed: whether its deltas are wanted; if not, steps only bring its result.
        """
        if request.seed is None:
            request = dataclasses.replace(request, seed=int(self._random.integers(2**32)))
        with InterruptsWait():
            self._drop_wasted()  # of requests that were aborted
            group = self._groups[request.request_id] = self.scheduler.add(request)
            if is_streamed:
                self._streamed[request.request_id] = not _is_ranked(group)

    def pin(self, request_id: str, prefix: Prompt) -> list[int]:
        """Queue a prefix to be computed and kept in the pool until ``unpin``; it is there once ``is_pinned``.

        Returns:
            The prefix's token ids.

        Raises:
            ValueError: prefix caching is off, the prefix is no valid prompt, or it leaves others too little room.
        """
        if not self.config.enable_prefix_caching:
            raise ValueError("enable_prefix_caching=False: a pinned prefix would never be found; turn it on")
        text, token_ids, salt = self._encode(prefix)
        params = SamplingParams(max_tokens=1)  # nothing is drawn
        with InterruptsWait():
            self.scheduler.pin(Request(request_id, text, token_ids, params, 0, salt))
        return token_ids

    def is_pinned(self, request_id: str) -> bool:
        """Whether a prefix that ``pin`` queued is in the pool."""
        return self.scheduler.is_pinned(request_id)

    def unpin(self, request_id: str) -> None:
        """Let a prefix go: its blocks stay in the prefix cache like any others.

        Raises:
            ValueError: it is not pinned, or not any more.
        """
        with InterruptsWait():
            self.scheduler.unpin(request_id)

    def abort(self, request_id: str) -> bool:
        """End a request now and free its blocks; its last deltas and its result wait for ``take``.

        Returns:
            False if it is unknown or has finished.
        """
        if request_id not in self._groups:
            return False
        with InterruptsWait():
            group = self.scheduler.abort(request_id)
            if group is None:
                return False
            self._to_collect[request_id] = group
            self._collect(group)
        return True

    def forget(self, request_id: str) -> None:
        """End a request, if it is there, and keep nothing of it: nobody waits for its result."""
        group = self._groups.get(request_id)
        if group is None:
            return
        with InterruptsWait():
            self.scheduler.abort(request_id)
            self._to_collect.pop(request_id, None)
            self._streamed.pop(request_id, None)
            del self._groups[request_id]
            for seq in group.sequences:
                self._progress.pop(seq.seq_id, None)

    @property
    def num_output_tokens(self) -> int:
        """Tokens that requests gained since the start; of a search, one for each live beam and step."""
        return self.scheduler.num_output_tokens

    @property
    def has_unfinished(self) -> bool:
        """Whether some request's result was not collected yet."""
        return bool(self._groups)

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int], bytes]:
        """The prompt's text, its token ids, and what separates its KV from that of others in the prefix cache."""
        if isinstance(prompt, str):
            prompt = {"prompt": prompt}
        if not isinstance(prompt, Mapping) or ("prompt" in prompt) == ("prompt_token_ids" in prompt):
            raise ValueError(
                f"prompt={prompt!r} is not valid: expected a string, {{'prompt': ...}} or {{'prompt_token_ids': [...]}}"
            )
        unknown = prompt.keys() - {"prompt", "prompt_token_ids", "cache_salt"}
        if unknown:
            raise ValueError(
                f"prompt has {sorted(unknown, key=str)}: expected prompt or prompt_token_ids, and cache_salt"
            )
        cache_salt = prompt.get("cache_salt")
        if cache_salt is not None and not isinstance(cache_salt, str):
            raise ValueError(f"cache_salt={cache_salt!r} is not valid: expected a string")
        if "prompt" in prompt:
            text = prompt["prompt"]
            token_ids = self._check_ids("the prompt", self._tokenize(text))
        else:
            text, token_ids = None, self._check_ids("prompt_token_ids", _as_list(prompt["prompt_token_ids"]))
        salt = self.model_config.prefix_salt(len(token_ids))
        if cache_salt is not None:
            salt += hashlib.sha256(cache_salt.encode(errors="surrogatepass")).digest()
        return text, token_ids, salt

    def _tokenize(self, prompt: str) -> list[int]:
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: give the prompt as {'prompt_token_ids': [...]}")
        if not isinstance(prompt, str):
            raise ValueError(f"prompt={prompt!r} is not valid: expected a string")
        if not prompt:
            raise ValueError("the prompt is empty: give at least one character")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt is no valid text ({error}): remove the lone surrogates") from None
        return list(self.tokenizer.encode(prompt))

    def _check_ids(self, where: str, token_ids: Any) -> list[int]:
        """The ids as plain integers, all of them in the vocabulary."""
        checked = []
        for i, token_id in enumerate(token_ids):
            is_int = isinstance(token_id, int | np.integer) and not isinstance(token_id, bool)
            if not is_int or not 0 <= token_id < self.model_config.vocab_size:
                raise ValueError(
                    f"{where}[{i}]={token_id!r} is not valid: expected token ids from 0 to "
                    f"{self.model_config.vocab_size - 1}, the model's vocabulary"
                )
            checked.append(int(token_id))
        return checked

    def _check_token_ids(self, params: SamplingParams) -> None:
        for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
            for token_id in ids or ():
                if token_id >= self.model_config.vocab_size:
                    last = self.model_config.vocab_size - 1
                    raise ValueError(f"{name} has token id {token_id}: the model's vocabulary ends at {last}")

    # Steps --------------------------------------------------------------------------------------------------------

    def step(self) -> StepOutput:
        """Finish one step and take what it brought. The next one is under way then, if it could be planned.

        A step that fails or is interrupted costs the running requests a recomputation, and nobody a token. A request
        whose text cannot be made (its tokenizer raised) is forgotten.
        """
        with InterruptsWait() as interrupts:
            self._collect_all()  # what an error left
            if self.scheduler.has_unfinished:
                try:
                    touched = self._run_step(interrupts)
                except BaseException:
                    self._under_way.clear()
                    self._to_collect |= self._groups
                    self.scheduler.forget_pool()
                    self.runner.forget_pool()
                    raise
                self.scheduler.costs = self.runner.costs
                self._to_collect |= {group.request.request_id: group for group in self._those_to_tell(touched)}
            self._collect_all()
            self._drop_wasted()
        return self.take()

    def _run_step(self, interrupts: InterruptsWait) -> list[SequenceGroup]:
        """Keep one step in flight: plan and enqueue the next before waiting for the results of this one."""
        if not self._under_way:
            self._enqueue(self.scheduler.schedule(), interrupts)
        plan = self.scheduler.schedule_ahead()
        if plan is not None:
            self._enqueue(plan, interrupts)
        step = self._under_way[0]
        with interrupts.let_through():
            result = self.runner.fetch(step)
        del self._under_way[0]
        return self.scheduler.update(step.plan, result)

    def _drop_wasted(self) -> None:
        """Nobody waits for steps under way whose sequences have all ended."""
        if not self.scheduler.has_unfinished:
            for _ in self._under_way:
                self.scheduler.drop()
            self._under_way.clear()

    def _enqueue(self, plan: StepPlan, interrupts: InterruptsWait) -> None:
        with interrupts.let_through():
            step = self.runner.enqueue(plan)
        self._under_way.append(step)

    def take(self) -> StepOutput:
        """What was collected and not yet handed out: by the last step, and by aborts since."""
        output, self._output = self._output, StepOutput()
        return output

    def _those_to_tell(self, touched: list[SequenceGroup]) -> list[SequenceGroup]:
        """Of groups that gained tokens, those for which there is something to do: read them, tell of them, or end."""
        if self.tokenizer is not None:
            return touched
        return [group for group in touched if group.is_finished or group.request.request_id in self._streamed]

    def _collect_all(self) -> None:
        for request_id, group in list(self._to_collect.items()):
            try:
                self._collect(group)
            except Exception:
                self.forget(request_id)
                raise

    def _collect(self, group: SequenceGroup) -> None:
        """Turn the tokens a group gained into text and deltas; end sequences whose text met a stop string."""
        request_id = group.request.request_id
        is_told = self._streamed.get(request_id, False)
        if is_told or (self.tokenizer is not None and (group.beam is None or group.is_finished)):
            for seq in group.sequences:  # live beams come and go
                self._collect_sequence(group, seq, is_told)
        if group.is_finished and request_id in self._groups:
            self._output.finished.append(self._finished_output(group))
            self.forget(request_id)
        self._to_collect.pop(request_id, None)

    def _collect_sequence(self, group: SequenceGroup, seq: Seq, is_told: bool) -> None:
        progress = self._progress.get(seq.seq_id) or self._progress_of(group, seq)
        if progress.is_ended:
            return
        detokenizer, start = progress.detokenizer, progress.num_characters
        end = 0 if detokenizer is None else self._read(group, seq, detokenizer)
        is_finished = seq.is_finished
        if is_told:
            new_ids = seq.token_ids[progress.num_tokens :]
            if new_ids or is_finished:
                text = ""
                if detokenizer is not None:
                    text = detokenizer.text[start:end]
                    progress.num_characters = max(start, end)
                delta = CompletionDelta(group.request.request_id, seq.index, text, new_ids, seq.finish_reason)
                self._output.deltas.append(delta)
                progress.num_tokens += len(new_ids)
        progress.is_ended = is_finished

    def _progress_of(self, group: SequenceGroup, seq: Seq) -> _Progress:
        progress = self._progress.get(seq.seq_id)
        if progress is None:
            detokenizer = None
            if self.tokenizer is not None:
                request = group.request
                detokenizer = Detokenizer(self.tokenizer, request.prompt_token_ids, request.params.stop_strings)
            progress = self._progress[seq.seq_id] = _Progress(detokenizer, seq.prompt_len)
        return progress

    def _read(self, group: SequenceGroup, seq: Seq, detokenizer: Detokenizer) -> int:
        """Turn new tokens into text; returns how many characters of it are decided."""
        for token_id in seq.token_ids[seq.prompt_len + detokenizer.num_tokens :]:
            if seq.finish_reason is FinishReason.STOP and token_id in group.stop_token_ids:
                break  # a stop token ends the text and is no part of it
            may_stop = detokenizer.num_tokens + 1 >= group.request.params.min_tokens
            detokenizer.append(token_id, may_stop=may_stop)
            if detokenizer.is_stopped:
                self.scheduler.finish(group, seq, FinishReason.STOP)
                break
        if seq.is_finished:
            detokenizer.finish()
        return detokenizer.num_decided(is_last=seq.is_finished)

    def _finished_output(self, group: SequenceGroup) -> RequestOutput:
        request = group.request
        outputs = [self._completion(group, seq) for seq in group.sequences]
        if _is_ranked(group):
            outputs.sort(key=lambda output: -(output.cumulative_logprob if output.score is None else output.score))
            outputs = [dataclasses.replace(output, index=i) for i, output in enumerate(outputs[: request.params.n])]
            if request.request_id in self._streamed:
                self._output.deltas.extend(
                    CompletionDelta(request.request_id, o.index, o.text, o.token_ids, o.finish_reason) for o in outputs
                )
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=outputs,
            prompt_logprobs=self._prompt_logprobs(group),
            num_cached_tokens=group.num_cached_tokens or 0,
        )

    def _completion(self, group: SequenceGroup, seq: Seq) -> CompletionOutput:
        num_logprobs = group.request.params.logprobs
        token_ids = seq.output_token_ids
        logprobs = None
        if num_logprobs is not None:
            rows = zip(token_ids, seq.output_scores, strict=True)
            logprobs = [self._logprobs(t, scores, row, num_logprobs) for t, (scores, row) in rows]
        detokenizer = self._progress_of(group, seq).detokenizer
        cumulative_logprob, score = float(sum(scores.logprobs[row] for scores, row in seq.output_scores)), None
        if group.beam is not None:
            cumulative_logprob = seq.cumulative_logprob or 0.0
            score = group.beam.score(cumulative_logprob, max(len(token_ids), 1)) if seq.score is None else seq.score
        return CompletionOutput(
            index=seq.index,
            text="" if detokenizer is None else detokenizer.text,
            token_ids=token_ids,
            cumulative_logprob=cumulative_logprob,
            logprobs=logprobs,
            finish_reason=seq.finish_reason,
            score=score,
        )

    def _prompt_logprobs(self, group: SequenceGroup) -> list[dict[int, Logprob] | None] | None:
        num_logprobs = group.request.params.prompt_logprobs
        if num_logprobs is None:
            return None
        rows = [(piece, row) for piece in group.prompt_scores for row in range(len(piece.logprobs))]
        targets = group.request.prompt_token_ids[1:]
        return [None, *(self._logprobs(t, s, row, num_logprobs) for t, (s, row) in zip(targets, rows, strict=False))]

    def _logprobs(self, token_id: int, scores: TokenScores, row: int, num_top: int) -> dict[int, Logprob]:
        """The most probable tokens, best first, and the chosen one if it is not among them."""
        found = {
            int(scores.top_ids[row, i]): Logprob(
                float(scores.top_logprobs[row, i]), i + 1, self._decode_one(int(scores.top_ids[row, i]))
            )
            for i in range(min(num_top, scores.top_ids.shape[1]))
        }
        chosen = Logprob(float(scores.logprobs[row]), int(scores.ranks[row]), self._decode_one(token_id))
        return found | {token_id: chosen}

    def _decode_one(self, token_id: int) -> str | None:
        return None if self.tokenizer is None else self.tokenizer.decode([token_id], skip_special_tokens=False)

    # Accounting ---------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        blocks, scheduler, pool = self.blocks.stats(), self.scheduler.stats(), self.runner.host_pool
        queried, logical = blocks.prefix_queried_tokens, scheduler.num_logical_blocks
        return EngineStats(
            num_blocks=blocks.num_blocks,
            num_used_blocks=blocks.num_used,
            num_shared_blocks=blocks.num_shared,
            num_cached_blocks=blocks.num_cached,
            tokens_held=blocks.tokens_held,
            internal_waste_percent=100 * blocks.waste,
            saved_by_sharing_percent=100 * (1 - scheduler.num_physical_blocks / logical) if logical else 0.0,
            num_copies_on_write=blocks.num_copies,
            num_waiting=scheduler.num_waiting,
            num_running=scheduler.num_running,
            num_pinned_prefixes=scheduler.num_pins,
            num_preemptions=scheduler.num_preemptions,
            num_swaps_out=scheduler.num_swaps_out,
            num_swaps_in=scheduler.num_swaps_in,
            bytes_to_host=pool.bytes_to_host if pool else 0,
            bytes_from_host=pool.bytes_from_host if pool else 0,
            transfer_stalled_s=pool.stalled_s if pool else 0.0,
            num_host_blocks=blocks.num_host_blocks,
            num_host_used_blocks=blocks.num_host_used,
            num_host_cached_blocks=blocks.num_host_cached,
            prefix_cache_hit_rate=blocks.prefix_hit_tokens / queried if queried else 0.0,
            host_cache_hit_tokens=blocks.host_hit_tokens,
            num_steps=scheduler.num_steps,
        )


def _is_ranked(group: SequenceGroup) -> bool:
    """Whether the results are the best of more sequences: none can be told of before all have ended."""
    return group.beam is not None or group.request.params.num_sequences > group.request.params.n


def _as_list(token_ids: Any) -> Sequence[Any] | np.ndarray:
    if isinstance(token_ids, str) or not isinstance(token_ids, Sequence | np.ndarray):
        raise ValueError(f"prompt_token_ids={token_ids!r} is not valid: expected a list of integers")
    if len(token_ids) == 0:
        raise ValueError("prompt_token_ids is empty: give at least one token")
    return token_ids
