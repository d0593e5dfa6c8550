from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GroupState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GROUP_STATE_UNSPECIFIED: _ClassVar[GroupState]
    GROUP_STATE_STARTING: _ClassVar[GroupState]
    GROUP_STATE_READY: _ClassVar[GroupState]
    GROUP_STATE_FAILED: _ClassVar[GroupState]
    GROUP_STATE_REBUILDING: _ClassVar[GroupState]
    GROUP_STATE_DRAINING: _ClassVar[GroupState]
GROUP_STATE_UNSPECIFIED: GroupState
GROUP_STATE_STARTING: GroupState
GROUP_STATE_READY: GroupState
GROUP_STATE_FAILED: GroupState
GROUP_STATE_REBUILDING: GroupState
GROUP_STATE_DRAINING: GroupState

class ScaleRequest(_message.Message):
    __slots__ = ("num_groups", "tensor_parallel_size")
    NUM_GROUPS_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    num_groups: int
    tensor_parallel_size: int
    def __init__(self, num_groups: _Optional[int] = ..., tensor_parallel_size: _Optional[int] = ...) -> None: ...

class ScaleProgress(_message.Message):
    __slots__ = ("message", "num_ready_groups", "num_groups")
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    NUM_READY_GROUPS_FIELD_NUMBER: _ClassVar[int]
    NUM_GROUPS_FIELD_NUMBER: _ClassVar[int]
    message: str
    num_ready_groups: int
    num_groups: int
    def __init__(self, message: _Optional[str] = ..., num_ready_groups: _Optional[int] = ..., num_groups: _Optional[int] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("version", "model", "uptime_s", "num_waiting", "groups", "num_gateways", "counters")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    NUM_GATEWAYS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    version: str
    model: str
    uptime_s: float
    num_waiting: int
    groups: _containers.RepeatedCompositeFieldContainer[GroupStatus]
    num_gateways: int
    counters: EngineCounters
    def __init__(self, version: _Optional[str] = ..., model: _Optional[str] = ..., uptime_s: _Optional[float] = ..., num_waiting: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[GroupStatus, _Mapping]]] = ..., num_gateways: _Optional[int] = ..., counters: _Optional[_Union[EngineCounters, _Mapping]] = ...) -> None: ...

class GroupStatus(_message.Message):
    __slots__ = ("group_id", "state", "epoch", "ranks", "block_size", "num_blocks", "num_free_blocks", "num_running", "num_inflight_steps", "steps", "failure", "blocks", "block_counters", "num_restarts")
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_INFLIGHT_STEPS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_COUNTERS_FIELD_NUMBER: _ClassVar[int]
    NUM_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    group_id: int
    state: GroupState
    epoch: int
    ranks: _containers.RepeatedCompositeFieldContainer[RankStatus]
    block_size: int
    num_blocks: int
    num_free_blocks: int
    num_running: int
    num_inflight_steps: int
    steps: StepCounters
    failure: str
    blocks: BlockStatus
    block_counters: BlockCounters
    num_restarts: int
    def __init__(self, group_id: _Optional[int] = ..., state: _Optional[_Union[GroupState, str]] = ..., epoch: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[RankStatus, _Mapping]]] = ..., block_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_free_blocks: _Optional[int] = ..., num_running: _Optional[int] = ..., num_inflight_steps: _Optional[int] = ..., steps: _Optional[_Union[StepCounters, _Mapping]] = ..., failure: _Optional[str] = ..., blocks: _Optional[_Union[BlockStatus, _Mapping]] = ..., block_counters: _Optional[_Union[BlockCounters, _Mapping]] = ..., num_restarts: _Optional[int] = ...) -> None: ...

class BlockStatus(_message.Message):
    __slots__ = ("num_used", "num_shared", "num_table_entries", "num_cached", "num_empty_places", "num_host", "num_host_used", "num_in_transfer")
    NUM_USED_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARED_FIELD_NUMBER: _ClassVar[int]
    NUM_TABLE_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_FIELD_NUMBER: _ClassVar[int]
    NUM_EMPTY_PLACES_FIELD_NUMBER: _ClassVar[int]
    NUM_HOST_FIELD_NUMBER: _ClassVar[int]
    NUM_HOST_USED_FIELD_NUMBER: _ClassVar[int]
    NUM_IN_TRANSFER_FIELD_NUMBER: _ClassVar[int]
    num_used: int
    num_shared: int
    num_table_entries: int
    num_cached: int
    num_empty_places: int
    num_host: int
    num_host_used: int
    num_in_transfer: int
    def __init__(self, num_used: _Optional[int] = ..., num_shared: _Optional[int] = ..., num_table_entries: _Optional[int] = ..., num_cached: _Optional[int] = ..., num_empty_places: _Optional[int] = ..., num_host: _Optional[int] = ..., num_host_used: _Optional[int] = ..., num_in_transfer: _Optional[int] = ...) -> None: ...

class BlockCounters(_message.Message):
    __slots__ = ("num_looked_up_tokens", "num_device_hit_tokens", "num_host_hit_tokens", "num_copied_blocks", "num_saved_blocks", "num_loaded_blocks", "num_evicted_blocks", "num_steps", "sum_used", "sum_table_entries", "sum_empty_places", "num_received_blocks")
    NUM_LOOKED_UP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_DEVICE_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_HOST_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_COPIED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_SAVED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOADED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_EVICTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    SUM_USED_FIELD_NUMBER: _ClassVar[int]
    SUM_TABLE_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    SUM_EMPTY_PLACES_FIELD_NUMBER: _ClassVar[int]
    NUM_RECEIVED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    num_looked_up_tokens: int
    num_device_hit_tokens: int
    num_host_hit_tokens: int
    num_copied_blocks: int
    num_saved_blocks: int
    num_loaded_blocks: int
    num_evicted_blocks: int
    num_steps: int
    sum_used: int
    sum_table_entries: int
    sum_empty_places: int
    num_received_blocks: int
    def __init__(self, num_looked_up_tokens: _Optional[int] = ..., num_device_hit_tokens: _Optional[int] = ..., num_host_hit_tokens: _Optional[int] = ..., num_copied_blocks: _Optional[int] = ..., num_saved_blocks: _Optional[int] = ..., num_loaded_blocks: _Optional[int] = ..., num_evicted_blocks: _Optional[int] = ..., num_steps: _Optional[int] = ..., sum_used: _Optional[int] = ..., sum_table_entries: _Optional[int] = ..., sum_empty_places: _Optional[int] = ..., num_received_blocks: _Optional[int] = ...) -> None: ...

class RankStatus(_message.Message):
    __slots__ = ("rank", "address", "device")
    RANK_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    rank: int
    address: str
    device: str
    def __init__(self, rank: _Optional[int] = ..., address: _Optional[str] = ..., device: _Optional[str] = ...) -> None: ...

class StepCounters(_message.Message):
    __slots__ = ("num_steps", "num_tokens", "step_time_s", "model_time_s", "plan_bytes")
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_TIME_S_FIELD_NUMBER: _ClassVar[int]
    MODEL_TIME_S_FIELD_NUMBER: _ClassVar[int]
    PLAN_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_steps: int
    num_tokens: int
    step_time_s: float
    model_time_s: float
    plan_bytes: int
    def __init__(self, num_steps: _Optional[int] = ..., num_tokens: _Optional[int] = ..., step_time_s: _Optional[float] = ..., model_time_s: _Optional[float] = ..., plan_bytes: _Optional[int] = ...) -> None: ...

class EngineCounters(_message.Message):
    __slots__ = ("num_requests", "num_finished", "num_cancelled", "num_failed", "num_preemptions", "num_prompt_tokens", "num_output_tokens")
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_FINISHED_FIELD_NUMBER: _ClassVar[int]
    NUM_CANCELLED_FIELD_NUMBER: _ClassVar[int]
    NUM_FAILED_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_requests: int
    num_finished: int
    num_cancelled: int
    num_failed: int
    num_preemptions: int
    num_prompt_tokens: int
    num_output_tokens: int
    def __init__(self, num_requests: _Optional[int] = ..., num_finished: _Optional[int] = ..., num_cancelled: _Optional[int] = ..., num_failed: _Optional[int] = ..., num_preemptions: _Optional[int] = ..., num_prompt_tokens: _Optional[int] = ..., num_output_tokens: _Optional[int] = ...) -> None: ...
