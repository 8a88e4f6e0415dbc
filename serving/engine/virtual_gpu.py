"""The virtual GPU: a vLLM executor that computes nothing and takes the time that a profile predicts.

Named by ``--distributed-executor-backend serving.engine.virtual_gpu.VirtualGpuExecutor``. Everything around it is
vLLM's own: API server, scheduler, KV-cache manager, prefix cache, metrics. Only this module of Penstock and the pure
ones that it imports are loaded into the engine.

Settings come from the environment, since vLLM constructs the executor: see ``launch``.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import GrammarOutput, NewRequestData, SchedulerOutput
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import ModelRunnerOutput

from serving.engine.control import ControlState, VirtualGpuControl
from serving.engine.environment import CONTROL_VARIABLE, PROFILE_VARIABLE, SLOWDOWN_VARIABLE, WORDS_VARIABLE
from serving.engine.virtual_batch import Answer, ScheduledRequest, StepClock, StepLoad, VirtualBatch, answer_length
from serving.profile import load_profile

#: How often the control file is looked at.
_CONTROL_POLL_S = 0.05
_CRASH_STATUS = 70
_PR_SET_PDEATHSIG = 1


class VirtualGpuExecutor(Executor):  # type: ignore[misc]  # vLLM's types are not followed, see pyproject.toml
    """One virtual device; vLLM calls it from the engine core's one thread."""

    def _init_executor(self) -> None:
        _die_with_parent()
        torch.set_num_threads(1)
        profile = load_profile(os.environ[PROFILE_VARIABLE])
        self._limits = profile.limits
        self._step_time = profile.step_time.slowed(float(os.environ[SLOWDOWN_VARIABLE]))
        self._max_model_len = self.model_config.max_model_len
        eos_id = self.model_config.hf_config.eos_token_id
        self._batch = VirtualBatch([int(word) for word in os.environ[WORDS_VARIABLE].split(",")], eos_id)
        self._clock = StepClock()
        self._switch = _Switch(VirtualGpuControl(Path(os.environ[CONTROL_VARIABLE])))

    def execute_model(
        self, scheduler_output: SchedulerOutput, non_block: bool = False
    ) -> ModelRunnerOutput | Future[ModelRunnerOutput]:
        """One step: the tokens that the schedule lets requests emit, when the profile says that it is over."""
        batch = self._batch
        batch.release(scheduler_output.finished_req_ids)
        for request in scheduler_output.scheduled_new_reqs:
            batch.admit(request.req_id, self._answer(request))
        scheduled = list(_scheduled(scheduler_output))
        emitted, load = batch.step(scheduled)
        if scheduled:
            self._wait(load, continues=bool(scheduler_output.scheduled_cached_reqs.req_ids))
        request_ids = [request.request_id for request in scheduled]
        output = ModelRunnerOutput(
            req_ids=request_ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(request_ids)},
            sampled_token_ids=emitted,
        )
        return _done(output) if non_block else output

    def _wait(self, load: StepLoad, *, continues: bool) -> None:
        if not continues:
            self._clock.restart(time.monotonic())
        duration_s = self._step_time.step_s(*load) / self._switch.speed
        time.sleep(max(0.0, self._clock.advance(duration_s, time.monotonic()) - time.monotonic()))
        if self._switch.wait_until_running():
            self._clock.restart(time.monotonic())

    def _answer(self, request: NewRequestData) -> Answer:
        prompt, parameters = request.prompt_token_ids or [], request.sampling_params
        if not isinstance(parameters, SamplingParams):
            raise TypeError("a virtual GPU generates text; it has no embeddings to pool")
        room = self._max_model_len - len(prompt)
        max_tokens = parameters.max_tokens or room
        if parameters.ignore_eos:
            return Answer(len(prompt), max_tokens + 1)
        length = answer_length(parameters.seed, hash(tuple(prompt)), max_tokens, room)
        return Answer(len(prompt), max(length, parameters.min_tokens))

    def get_kv_cache_specs(self) -> list[dict[str, KVCacheSpec]]:
        """One layer of the smallest page: only the number of blocks matters."""
        spec = FullAttentionSpec(
            block_size=self.cache_config.block_size, num_kv_heads=1, head_size=1, dtype=torch.float16
        )
        return [{"model.layers.0.self_attn.attn": spec}]

    def determine_available_memory(self) -> list[int]:
        """The bytes in which vLLM finds room for exactly the profile's KV tokens, rounded down to whole blocks."""
        (spec,) = self.get_kv_cache_specs()[0].values()
        return [self._limits.kv_tokens // spec.block_size * spec.page_size_bytes]

    def initialize_from_config(self, kv_cache_configs: list[KVCacheConfig]) -> None:
        """No cache is allocated."""

    def compile_or_warm_up_model(self) -> None:
        """Nothing is compiled."""

    def set_kv_cache_layout(self, layout_name: str) -> None:
        """No cache, no layout."""

    def sample_tokens(
        self, grammar_output: GrammarOutput | None, non_block: bool = False
    ) -> ModelRunnerOutput | Future[ModelRunnerOutput]:
        """Never needed: ``execute_model`` has sampled already."""
        raise NotImplementedError("a virtual GPU samples in execute_model")

    def take_draft_token_ids(self) -> None:
        """No speculative decoding."""

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,  # noqa: ARG002 - vLLM's signature
        args: tuple[Any, ...] = (),  # noqa: ARG002 - vLLM's signature
        kwargs: dict[str, Any] | None = None,  # noqa: ARG002 - vLLM's signature
        non_block: bool = False,
    ) -> Any:
        """Answers of the one worker that is not there; None to what only a real device would do."""
        answers = {"get_supported_tasks": ("generate",), "get_supported_kv_cache_layouts": ["NHD"]}
        answer = [answers.get(method) if isinstance(method, str) else None]
        return _done(answer) if non_block else answer

    def check_health(self) -> None:
        """Healthy as long as the process lives, as a hung GPU is."""

    def shutdown(self) -> None:
        """Nothing to release; the control thread is a daemon."""


class _Switch:
    """The control file's state, kept current by a thread so that a step costs no system call for it."""

    def __init__(self, control: VirtualGpuControl) -> None:
        self.speed = 1.0
        self._control = control
        self._running = threading.Event()
        self._apply(control.state())
        threading.Thread(target=self._watch, name="virtual-gpu-control", daemon=True).start()

    def wait_until_running(self) -> bool:
        """Returns at once unless frozen; whether it had to wait."""
        if self._running.is_set():
            return False
        self._running.wait()
        return True

    def _watch(self) -> None:
        seen = self._control.version()
        while True:
            time.sleep(_CONTROL_POLL_S)
            version = self._control.version()
            if version != seen:
                seen = version
                self._apply(self._control.state())

    def _apply(self, state: ControlState) -> None:
        if state.mode == "crashed":
            os._exit(_CRASH_STATUS)
        self.speed = state.speed
        if state.mode == "frozen":
            self._running.clear()
        else:
            self._running.set()


def _scheduled(output: SchedulerOutput) -> Iterator[ScheduledRequest]:
    added = output.num_scheduled_tokens
    for request in output.scheduled_new_reqs:
        yield ScheduledRequest(request.req_id, request.num_computed_tokens, added[request.req_id], 0)
    cached = output.scheduled_cached_reqs
    for request_id, computed, outputs in zip(
        cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
    ):
        yield ScheduledRequest(request_id, computed, added[request_id], outputs)


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def _die_with_parent() -> None:
    """An API server that is killed leaves its engine core behind; on Linux the kernel then ends this one too."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
