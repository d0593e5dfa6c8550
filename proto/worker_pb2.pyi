from octavo.proto import engine_pb2 as _engine_pb2
from octavo.proto import sampling_pb2 as _sampling_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PingRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PingResponse(_message.Message):
    __slots__ = ("epoch", "is_profiling")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    IS_PROFILING_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    is_profiling: bool
    def __init__(self, epoch: _Optional[int] = ..., is_profiling: _Optional[bool] = ...) -> None: ...

class ConfigureRequest(_message.Message):
    __slots__ = ("config", "rank", "tensor_parallel_size", "epoch", "weight_source")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_SOURCE_FIELD_NUMBER: _ClassVar[int]
    config: _engine_pb2.WorkerConfig
    rank: int
    tensor_parallel_size: int
    epoch: int
    weight_source: str
    def __init__(self, config: _Optional[_Union[_engine_pb2.WorkerConfig, _Mapping]] = ..., rank: _Optional[int] = ..., tensor_parallel_size: _Optional[int] = ..., epoch: _Optional[int] = ..., weight_source: _Optional[str] = ...) -> None: ...

class ConfigureProgress(_message.Message):
    __slots__ = ("stage", "duration_s", "num_blocks", "num_host_blocks", "host_block_us", "kept_weights", "copied_weights", "copy_failure")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HOST_BLOCK_US_FIELD_NUMBER: _ClassVar[int]
    KEPT_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    COPIED_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    COPY_FAILURE_FIELD_NUMBER: _ClassVar[int]
    stage: str
    duration_s: float
    num_blocks: int
    num_host_blocks: int
    host_block_us: float
    kept_weights: bool
    copied_weights: bool
    copy_failure: str
    def __init__(self, stage: _Optional[str] = ..., duration_s: _Optional[float] = ..., num_blocks: _Optional[int] = ..., num_host_blocks: _Optional[int] = ..., host_block_us: _Optional[float] = ..., kept_weights: _Optional[bool] = ..., copied_weights: _Optional[bool] = ..., copy_failure: _Optional[str] = ...) -> None: ...

class SendRequest(_message.Message):
    __slots__ = ("opening", "block_ids", "after_step")
    OPENING_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    AFTER_STEP_FIELD_NUMBER: _ClassVar[int]
    opening: SendOpening
    block_ids: bytes
    after_step: int
    def __init__(self, opening: _Optional[_Union[SendOpening, _Mapping]] = ..., block_ids: _Optional[bytes] = ..., after_step: _Optional[int] = ...) -> None: ...

class SendOpening(_message.Message):
    __slots__ = ("store_address", "device_type", "weights", "blocks")
    STORE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_TYPE_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    store_address: str
    device_type: str
    weights: WeightsWanted
    blocks: BlocksWanted
    def __init__(self, store_address: _Optional[str] = ..., device_type: _Optional[str] = ..., weights: _Optional[_Union[WeightsWanted, _Mapping]] = ..., blocks: _Optional[_Union[BlocksWanted, _Mapping]] = ...) -> None: ...

class WeightsWanted(_message.Message):
    __slots__ = ("config", "rank", "tensor_parallel_size", "layout")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    config: _engine_pb2.WorkerConfig
    rank: int
    tensor_parallel_size: int
    layout: bytes
    def __init__(self, config: _Optional[_Union[_engine_pb2.WorkerConfig, _Mapping]] = ..., rank: _Optional[int] = ..., tensor_parallel_size: _Optional[int] = ..., layout: _Optional[bytes] = ...) -> None: ...

class BlocksWanted(_message.Message):
    __slots__ = ("epoch", "block_bytes", "num_rows")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    block_bytes: int
    num_rows: int
    def __init__(self, epoch: _Optional[int] = ..., block_bytes: _Optional[int] = ..., num_rows: _Optional[int] = ...) -> None: ...

class SendResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReceiveBlocksRequest(_message.Message):
    __slots__ = ("epoch", "source_address", "source_epoch", "source_block_ids", "block_ids", "after_step", "source_after_step")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    AFTER_STEP_FIELD_NUMBER: _ClassVar[int]
    SOURCE_AFTER_STEP_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    source_address: str
    source_epoch: int
    source_block_ids: bytes
    block_ids: bytes
    after_step: int
    source_after_step: int
    def __init__(self, epoch: _Optional[int] = ..., source_address: _Optional[str] = ..., source_epoch: _Optional[int] = ..., source_block_ids: _Optional[bytes] = ..., block_ids: _Optional[bytes] = ..., after_step: _Optional[int] = ..., source_after_step: _Optional[int] = ...) -> None: ...

class ReceiveBlocksResponse(_message.Message):
    __slots__ = ("failure", "duration_us", "num_bytes")
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    DURATION_US_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    failure: str
    duration_us: float
    num_bytes: int
    def __init__(self, failure: _Optional[str] = ..., duration_us: _Optional[float] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class ProfileRequest(_message.Message):
    __slots__ = ("num_steps", "trace_path")
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    TRACE_PATH_FIELD_NUMBER: _ClassVar[int]
    num_steps: int
    trace_path: str
    def __init__(self, num_steps: _Optional[int] = ..., trace_path: _Optional[str] = ...) -> None: ...

class ProfileResponse(_message.Message):
    __slots__ = ("num_steps", "span_us", "idle_us", "step_gaps_us", "kernels")
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    SPAN_US_FIELD_NUMBER: _ClassVar[int]
    IDLE_US_FIELD_NUMBER: _ClassVar[int]
    STEP_GAPS_US_FIELD_NUMBER: _ClassVar[int]
    KERNELS_FIELD_NUMBER: _ClassVar[int]
    num_steps: int
    span_us: float
    idle_us: float
    step_gaps_us: _containers.RepeatedScalarFieldContainer[float]
    kernels: _containers.RepeatedCompositeFieldContainer[KernelTime]
    def __init__(self, num_steps: _Optional[int] = ..., span_us: _Optional[float] = ..., idle_us: _Optional[float] = ..., step_gaps_us: _Optional[_Iterable[float]] = ..., kernels: _Optional[_Iterable[_Union[KernelTime, _Mapping]]] = ...) -> None: ...

class KernelTime(_message.Message):
    __slots__ = ("name", "calls", "time_us", "mean_us")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    TIME_US_FIELD_NUMBER: _ClassVar[int]
    MEAN_US_FIELD_NUMBER: _ClassVar[int]
    name: str
    calls: float
    time_us: float
    mean_us: float
    def __init__(self, name: _Optional[str] = ..., calls: _Optional[float] = ..., time_us: _Optional[float] = ..., mean_us: _Optional[float] = ...) -> None: ...

class BatchPlan(_message.Message):
    __slots__ = ("epoch", "step_id", "leave_slots", "joins", "append_slots", "append_block_ids", "decode_slots_changed", "decode_slots", "chunk_slots", "chunk_num_tokens", "amend_slots", "amend_token_ids", "copy_from_block_ids", "copy_to_block_ids", "save_block_ids", "save_host_ids", "load_host_ids", "load_block_ids", "finished_transfers")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    LEAVE_SLOTS_FIELD_NUMBER: _ClassVar[int]
    JOINS_FIELD_NUMBER: _ClassVar[int]
    APPEND_SLOTS_FIELD_NUMBER: _ClassVar[int]
    APPEND_BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    DECODE_SLOTS_CHANGED_FIELD_NUMBER: _ClassVar[int]
    DECODE_SLOTS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_SLOTS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    AMEND_SLOTS_FIELD_NUMBER: _ClassVar[int]
    AMEND_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    COPY_FROM_BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    COPY_TO_BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    SAVE_BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    SAVE_HOST_IDS_FIELD_NUMBER: _ClassVar[int]
    LOAD_HOST_IDS_FIELD_NUMBER: _ClassVar[int]
    LOAD_BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step_id: int
    leave_slots: bytes
    joins: _containers.RepeatedCompositeFieldContainer[SlotJoin]
    append_slots: bytes
    append_block_ids: bytes
    decode_slots_changed: bool
    decode_slots: bytes
    chunk_slots: bytes
    chunk_num_tokens: bytes
    amend_slots: bytes
    amend_token_ids: bytes
    copy_from_block_ids: bytes
    copy_to_block_ids: bytes
    save_block_ids: bytes
    save_host_ids: bytes
    load_host_ids: bytes
    load_block_ids: bytes
    finished_transfers: int
    def __init__(self, epoch: _Optional[int] = ..., step_id: _Optional[int] = ..., leave_slots: _Optional[bytes] = ..., joins: _Optional[_Iterable[_Union[SlotJoin, _Mapping]]] = ..., append_slots: _Optional[bytes] = ..., append_block_ids: _Optional[bytes] = ..., decode_slots_changed: _Optional[bool] = ..., decode_slots: _Optional[bytes] = ..., chunk_slots: _Optional[bytes] = ..., chunk_num_tokens: _Optional[bytes] = ..., amend_slots: _Optional[bytes] = ..., amend_token_ids: _Optional[bytes] = ..., copy_from_block_ids: _Optional[bytes] = ..., copy_to_block_ids: _Optional[bytes] = ..., save_block_ids: _Optional[bytes] = ..., save_host_ids: _Optional[bytes] = ..., load_host_ids: _Optional[bytes] = ..., load_block_ids: _Optional[bytes] = ..., finished_transfers: _Optional[int] = ...) -> None: ...

class SlotJoin(_message.Message):
    __slots__ = ("slot", "token_ids", "num_prompt_tokens", "num_computed_tokens", "block_ids", "sampling_params")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_PARAMS_FIELD_NUMBER: _ClassVar[int]
    slot: int
    token_ids: bytes
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: bytes
    sampling_params: _sampling_pb2.SamplingParams
    def __init__(self, slot: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., num_prompt_tokens: _Optional[int] = ..., num_computed_tokens: _Optional[int] = ..., block_ids: _Optional[bytes] = ..., sampling_params: _Optional[_Union[_sampling_pb2.SamplingParams, _Mapping]] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("epoch", "step_id", "token_ids", "logprobs", "prompt_logprobs", "model_time_us", "failure", "finished_transfers", "failed_rows", "idle_us")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MODEL_TIME_US_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    FINISHED_TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    FAILED_ROWS_FIELD_NUMBER: _ClassVar[int]
    IDLE_US_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step_id: int
    token_ids: bytes
    logprobs: _containers.RepeatedCompositeFieldContainer[RowLogprobs]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[ChunkLogprobs]
    model_time_us: int
    failure: str
    finished_transfers: int
    failed_rows: bytes
    idle_us: int
    def __init__(self, epoch: _Optional[int] = ..., step_id: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., logprobs: _Optional[_Iterable[_Union[RowLogprobs, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[ChunkLogprobs, _Mapping]]] = ..., model_time_us: _Optional[int] = ..., failure: _Optional[str] = ..., finished_transfers: _Optional[int] = ..., failed_rows: _Optional[bytes] = ..., idle_us: _Optional[int] = ...) -> None: ...

class RowLogprobs(_message.Message):
    __slots__ = ("row", "table")
    ROW_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    row: int
    table: _sampling_pb2.LogprobTable
    def __init__(self, row: _Optional[int] = ..., table: _Optional[_Union[_sampling_pb2.LogprobTable, _Mapping]] = ...) -> None: ...

class ChunkLogprobs(_message.Message):
    __slots__ = ("chunk", "start", "table")
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    chunk: int
    start: int
    table: _sampling_pb2.LogprobTable
    def __init__(self, chunk: _Optional[int] = ..., start: _Optional[int] = ..., table: _Optional[_Union[_sampling_pb2.LogprobTable, _Mapping]] = ...) -> None: ...
