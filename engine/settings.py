"""Settings of a worker."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from engine.sim.parameters import SimParameters
from protos.core.settings import Port, Positive

NotNegative = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]
Gib = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
DEFAULT_MODEL = "SmolLM2-135M-Instruct"


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section [engine]. None leaves a choice to the backend."""

    backend: Literal["vllm", "sim"] = "vllm"
    model: str = DEFAULT_MODEL
    """Name of a pulled model, a path, or a name on the model hub."""
    served_model_name: list[str] = []
    """Names that clients use; the model's own where none is given."""
    lora: dict[str, str] = {}
    """Folders of LoRA adapters by the names that clients use, in section [engine.lora]."""
    host: str = "127.0.0.1"
    port: Port = 9101
    name: str = "worker-1"
    profile: str = ""
    drain_s: Seconds = 300.0
    """After SIGTERM running requests get this long to finish: as long as a gateway lets them run."""
    is_verbose: bool = False
    step_log: str = ""
    """File to which the engine's steps and requests are written, for `tidegate engine calibrate`."""

    max_model_len: Positive | None = None
    max_num_seqs: Positive | None = None
    max_num_batched_tokens: Positive | None = None
    makes_way: bool = True
    """Long prompts make way for urgent ones where the gateway says so. vLLM's scheduler is extended for that, as it is
    in the version that Tidegate installs: false leaves it as it is, and the gateway reckons with prompts that are
    computed whole. The same goes for a `scheduler_cls` of your own."""

    dtype: str = "auto"
    """"auto" is the model's own, but on a CPU float32 for the default model, and where bf16 is emulated."""
    quantization: str | None = None
    tensor_parallel_size: Positive = 1
    enforce_eager: bool | None = None
    """Skip compiling: by default on a CPU only, where it takes minutes."""
    gpu_memory_utilization: Share | None = None
    """Share of a GPU's memory that vLLM may use."""
    kv_cache_gib: Gib | None = None
    """Size of the KV cache; on a GPU it follows from `gpu_memory_utilization` where this is not given."""
    cpu_cores: str = "auto"
    """Cores for vLLM on the CPU, as "0-3"; "auto" is all of up to four, and vLLM's own choice of more."""
    vllm: dict[str, Any] = {}
    """Any other argument of vLLM's AsyncEngineArgs, by its Python name."""

    sim: SimParameters = SimParameters()

    def __post_init__(self) -> None:
        if taken := set(self.model_names) & self.lora.keys():
            raise ValueError(f"lora: '{min(taken)}' is the name of the model")

    @property
    def model_names(self) -> tuple[str, ...]:
        """What clients may call the model itself."""
        is_path = self.model.startswith(("/", ".", "~"))
        return tuple(self.served_model_name) or (Path(self.model).name if is_path else self.model,)

    @property
    def names(self) -> tuple[str, ...]:
        """What clients may ask for; the first is the model's name in answers."""
        return (*self.model_names, *self.lora)
