from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class GatewayConfig(_message.Message):
    __slots__ = ("engine_address", "host", "http_port", "grpc_port", "model_path", "served_model_names", "max_model_len", "vocab_size", "eos_token_ids", "seed", "local_address", "skip_tokenizer_init", "shutdown_timeout_s", "launcher_address", "max_outage_s")
    ENGINE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    HTTP_PORT_FIELD_NUMBER: _ClassVar[int]
    GRPC_PORT_FIELD_NUMBER: _ClassVar[int]
    MODEL_PATH_FIELD_NUMBER: _ClassVar[int]
    SERVED_MODEL_NAMES_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    LOCAL_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SKIP_TOKENIZER_INIT_FIELD_NUMBER: _ClassVar[int]
    SHUTDOWN_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    LAUNCHER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MAX_OUTAGE_S_FIELD_NUMBER: _ClassVar[int]
    engine_address: str
    host: str
    http_port: int
    grpc_port: int
    model_path: str
    served_model_names: _containers.RepeatedScalarFieldContainer[str]
    max_model_len: int
    vocab_size: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    seed: int
    local_address: str
    skip_tokenizer_init: bool
    shutdown_timeout_s: float
    launcher_address: str
    max_outage_s: float
    def __init__(self, engine_address: _Optional[str] = ..., host: _Optional[str] = ..., http_port: _Optional[int] = ..., grpc_port: _Optional[int] = ..., model_path: _Optional[str] = ..., served_model_names: _Optional[_Iterable[str]] = ..., max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., seed: _Optional[int] = ..., local_address: _Optional[str] = ..., skip_tokenizer_init: _Optional[bool] = ..., shutdown_timeout_s: _Optional[float] = ..., launcher_address: _Optional[str] = ..., max_outage_s: _Optional[float] = ...) -> None: ...
