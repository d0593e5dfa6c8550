from octavo.proto import admin_pb2 as _admin_pb2
from octavo.proto import sampling_pb2 as _sampling_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EarlyStopping(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EARLY_STOPPING_UNSPECIFIED: _ClassVar[EarlyStopping]
    EARLY_STOPPING_HEURISTIC: _ClassVar[EarlyStopping]
    EARLY_STOPPING_FIRST: _ClassVar[EarlyStopping]
    EARLY_STOPPING_NEVER: _ClassVar[EarlyStopping]
EARLY_STOPPING_UNSPECIFIED: EarlyStopping
EARLY_STOPPING_HEURISTIC: EarlyStopping
EARLY_STOPPING_FIRST: EarlyStopping
EARLY_STOPPING_NEVER: EarlyStopping

class SessionRequest(_message.Message):
    __slots__ = ("submits", "cancel_handles", "stop_handles")
    SUBMITS_FIELD_NUMBER: _ClassVar[int]
    CANCEL_HANDLES_FIELD_NUMBER: _ClassVar[int]
    STOP_HANDLES_FIELD_NUMBER: _ClassVar[int]
    submits: _containers.RepeatedCompositeFieldContainer[Submit]
    cancel_handles: bytes
    stop_handles: bytes
    def __init__(self, submits: _Optional[_Iterable[_Union[Submit, _Mapping]]] = ..., cancel_handles: _Optional[bytes] = ..., stop_handles: _Optional[bytes] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("handle", "prompt_token_ids", "sampling_params", "priority", "num_samples", "cache_salt", "beam_search", "resumed")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_PARAMS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    BEAM_SEARCH_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    handle: int
    prompt_token_ids: bytes
    sampling_params: _sampling_pb2.SamplingParams
    priority: int
    num_samples: int
    cache_salt: bytes
    beam_search: BeamSearch
    resumed: _containers.RepeatedCompositeFieldContainer[ResumedOutput]
    def __init__(self, handle: _Optional[int] = ..., prompt_token_ids: _Optional[bytes] = ..., sampling_params: _Optional[_Union[_sampling_pb2.SamplingParams, _Mapping]] = ..., priority: _Optional[int] = ..., num_samples: _Optional[int] = ..., cache_salt: _Optional[bytes] = ..., beam_search: _Optional[_Union[BeamSearch, _Mapping]] = ..., resumed: _Optional[_Iterable[_Union[ResumedOutput, _Mapping]]] = ...) -> None: ...

class ResumedOutput(_message.Message):
    __slots__ = ("index", "token_ids", "num_prompt_logprobs")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    index: int
    token_ids: bytes
    num_prompt_logprobs: int
    def __init__(self, index: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., num_prompt_logprobs: _Optional[int] = ...) -> None: ...

class BeamSearch(_message.Message):
    __slots__ = ("num_beams", "length_penalty", "early_stopping")
    NUM_BEAMS_FIELD_NUMBER: _ClassVar[int]
    LENGTH_PENALTY_FIELD_NUMBER: _ClassVar[int]
    EARLY_STOPPING_FIELD_NUMBER: _ClassVar[int]
    num_beams: int
    length_penalty: float
    early_stopping: EarlyStopping
    def __init__(self, num_beams: _Optional[int] = ..., length_penalty: _Optional[float] = ..., early_stopping: _Optional[_Union[EarlyStopping, str]] = ...) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("handles", "num_tokens", "finish_reasons", "token_ids", "logprobs", "prompt_logprobs", "failures", "cached_handles", "num_cached_tokens", "beam_scores")
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASONS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    CACHED_HANDLES_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BEAM_SCORES_FIELD_NUMBER: _ClassVar[int]
    handles: bytes
    num_tokens: bytes
    finish_reasons: bytes
    token_ids: bytes
    logprobs: _containers.RepeatedCompositeFieldContainer[EntryLogprobs]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[PromptLogprobs]
    failures: _containers.RepeatedCompositeFieldContainer[Failure]
    cached_handles: bytes
    num_cached_tokens: bytes
    beam_scores: bytes
    def __init__(self, handles: _Optional[bytes] = ..., num_tokens: _Optional[bytes] = ..., finish_reasons: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ..., logprobs: _Optional[_Iterable[_Union[EntryLogprobs, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[PromptLogprobs, _Mapping]]] = ..., failures: _Optional[_Iterable[_Union[Failure, _Mapping]]] = ..., cached_handles: _Optional[bytes] = ..., num_cached_tokens: _Optional[bytes] = ..., beam_scores: _Optional[bytes] = ...) -> None: ...

class EntryLogprobs(_message.Message):
    __slots__ = ("entry", "table")
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    entry: int
    table: _sampling_pb2.LogprobTable
    def __init__(self, entry: _Optional[int] = ..., table: _Optional[_Union[_sampling_pb2.LogprobTable, _Mapping]] = ...) -> None: ...

class PromptLogprobs(_message.Message):
    __slots__ = ("handle", "start", "table")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    start: int
    table: _sampling_pb2.LogprobTable
    def __init__(self, handle: _Optional[int] = ..., start: _Optional[int] = ..., table: _Optional[_Union[_sampling_pb2.LogprobTable, _Mapping]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("handle", "code", "message", "retry_after_s", "field")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    handle: int
    code: int
    message: str
    retry_after_s: float
    field: str
    def __init__(self, handle: _Optional[int] = ..., code: _Optional[int] = ..., message: _Optional[str] = ..., retry_after_s: _Optional[float] = ..., field: _Optional[str] = ...) -> None: ...

class EngineConfig(_message.Message):
    __slots__ = ("address", "model", "vocab_size", "max_model_len", "block_size", "max_num_seqs", "max_num_batched_tokens", "max_num_waiting", "num_inflight_steps", "itl_target_ms", "enable_prefix_caching", "step_timeout_s", "rebuilds_groups", "incarnation")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_BATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_INFLIGHT_STEPS_FIELD_NUMBER: _ClassVar[int]
    ITL_TARGET_MS_FIELD_NUMBER: _ClassVar[int]
    ENABLE_PREFIX_CACHING_FIELD_NUMBER: _ClassVar[int]
    STEP_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    REBUILDS_GROUPS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    address: str
    model: str
    vocab_size: int
    max_model_len: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_waiting: int
    num_inflight_steps: int
    itl_target_ms: float
    enable_prefix_caching: bool
    step_timeout_s: float
    rebuilds_groups: bool
    incarnation: int
    def __init__(self, address: _Optional[str] = ..., model: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., block_size: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., max_num_batched_tokens: _Optional[int] = ..., max_num_waiting: _Optional[int] = ..., num_inflight_steps: _Optional[int] = ..., itl_target_ms: _Optional[float] = ..., enable_prefix_caching: _Optional[bool] = ..., step_timeout_s: _Optional[float] = ..., rebuilds_groups: _Optional[bool] = ..., incarnation: _Optional[int] = ...) -> None: ...

class AwaitFailureRequest(_message.Message):
    __slots__ = ("known_epochs",)
    KNOWN_EPOCHS_FIELD_NUMBER: _ClassVar[int]
    known_epochs: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, known_epochs: _Optional[_Iterable[int]] = ...) -> None: ...

class AwaitFailureResponse(_message.Message):
    __slots__ = ("failures",)
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    failures: _containers.RepeatedCompositeFieldContainer[GroupFailure]
    def __init__(self, failures: _Optional[_Iterable[_Union[GroupFailure, _Mapping]]] = ...) -> None: ...

class GroupFailure(_message.Message):
    __slots__ = ("group_id", "epoch", "reason", "age_s", "silent_s", "is_explained")
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    SILENT_S_FIELD_NUMBER: _ClassVar[int]
    IS_EXPLAINED_FIELD_NUMBER: _ClassVar[int]
    group_id: int
    epoch: int
    reason: str
    age_s: float
    silent_s: float
    is_explained: bool
    def __init__(self, group_id: _Optional[int] = ..., epoch: _Optional[int] = ..., reason: _Optional[str] = ..., age_s: _Optional[float] = ..., silent_s: _Optional[float] = ..., is_explained: _Optional[bool] = ...) -> None: ...

class AbandonGroupRequest(_message.Message):
    __slots__ = ("group_id",)
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    group_id: int
    def __init__(self, group_id: _Optional[int] = ...) -> None: ...

class AbandonGroupResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RemoveGroupRequest(_message.Message):
    __slots__ = ("group_id",)
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    group_id: int
    def __init__(self, group_id: _Optional[int] = ...) -> None: ...

class RemoveGroupProgress(_message.Message):
    __slots__ = ("num_running",)
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    def __init__(self, num_running: _Optional[int] = ...) -> None: ...

class AddGroupRequest(_message.Message):
    __slots__ = ("group_id", "workers", "config", "has_served")
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    HAS_SERVED_FIELD_NUMBER: _ClassVar[int]
    group_id: int
    workers: _containers.RepeatedCompositeFieldContainer[WorkerEndpoint]
    config: WorkerConfig
    has_served: bool
    def __init__(self, group_id: _Optional[int] = ..., workers: _Optional[_Iterable[_Union[WorkerEndpoint, _Mapping]]] = ..., config: _Optional[_Union[WorkerConfig, _Mapping]] = ..., has_served: _Optional[bool] = ...) -> None: ...

class WorkerEndpoint(_message.Message):
    __slots__ = ("address", "device", "weight_source")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_SOURCE_FIELD_NUMBER: _ClassVar[int]
    address: str
    device: str
    weight_source: str
    def __init__(self, address: _Optional[str] = ..., device: _Optional[str] = ..., weight_source: _Optional[str] = ...) -> None: ...

class WorkerConfig(_message.Message):
    __slots__ = ("model_path", "load_format", "dtype", "block_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization", "num_blocks_override", "store_address", "seed", "enforce_eager", "swap_space_bytes", "kv_cache_dtype")
    MODEL_PATH_FIELD_NUMBER: _ClassVar[int]
    LOAD_FORMAT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_BATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GPU_MEMORY_UTILIZATION_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_OVERRIDE_FIELD_NUMBER: _ClassVar[int]
    STORE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    ENFORCE_EAGER_FIELD_NUMBER: _ClassVar[int]
    SWAP_SPACE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    model_path: str
    load_format: str
    dtype: str
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    num_blocks_override: int
    store_address: str
    seed: int
    enforce_eager: bool
    swap_space_bytes: int
    kv_cache_dtype: str
    def __init__(self, model_path: _Optional[str] = ..., load_format: _Optional[str] = ..., dtype: _Optional[str] = ..., block_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., max_num_batched_tokens: _Optional[int] = ..., gpu_memory_utilization: _Optional[float] = ..., num_blocks_override: _Optional[int] = ..., store_address: _Optional[str] = ..., seed: _Optional[int] = ..., enforce_eager: _Optional[bool] = ..., swap_space_bytes: _Optional[int] = ..., kv_cache_dtype: _Optional[str] = ...) -> None: ...

class AddGroupProgress(_message.Message):
    __slots__ = ("stage", "duration_s", "num_blocks", "num_host_blocks")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    stage: str
    duration_s: float
    num_blocks: int
    num_host_blocks: int
    def __init__(self, stage: _Optional[str] = ..., duration_s: _Optional[float] = ..., num_blocks: _Optional[int] = ..., num_host_blocks: _Optional[int] = ...) -> None: ...
