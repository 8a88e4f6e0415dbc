"""The environment that an engine process is started in."""

from __future__ import annotations

PROFILE_VARIABLE = "PENSTOCK_VIRTUAL_GPU_PROFILE"
SLOWDOWN_VARIABLE = "PENSTOCK_VIRTUAL_GPU_SLOWDOWN"
CONTROL_VARIABLE = "PENSTOCK_VIRTUAL_GPU_CONTROL"
WORDS_VARIABLE = "PENSTOCK_VIRTUAL_GPU_WORD_IDS"

#: CUDA's own: the GPUs that a process may use.
GPUS_VARIABLE = "CUDA_VISIBLE_DEVICES"

#: No engine reports home.
PRIVATE = {"DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

#: A model made on the spot needs no hub.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

#: One thread each: the libraries' pools would only take memory and cores from the replicas beside them.
SINGLE_THREADED = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
