"""What clients may send, as OpenAI's interface defines it, with the fields that vLLM adds to it."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..requests import MAX_LOGIT_BIAS, MAX_LOGPROBS, Sampling

__all__ = ["ChatRequest", "CompletionRequest", "GenerationRequest", "StreamOptions", "TokenizeRequest"]

MAX_CHOICES = 128
_MAX_STOPS = 16
_MAX_STOP_LENGTH = 1000
_MAX_DEPTH = 64
_INT64 = 2**63
_FORMS = ("text", "json_object", "json_schema")


def _plain(value: Any) -> Any:
    """Nested data as it is; ValueError for numbers that are not finite, and where it is nested too deeply."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        if any(isinstance(each, float) and not math.isfinite(each) for each in level):
            raise ValueError("numbers must be finite")
        inner = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, (dict, list))]
        level = [each for values in inner for each in values]
        if not level:
            return value
    raise ValueError(f"nested more than {_MAX_DEPTH} levels deep")


Data = Annotated[dict[str, Any], AfterValidator(_plain)]


def _stops(value: Any) -> Any:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError("must be a string or a list of strings, none of them empty")
    if len(stops) > _MAX_STOPS or any(len(stop) > _MAX_STOP_LENGTH for stop in stops):
        raise ValueError(f"at most {_MAX_STOPS} strings of at most {_MAX_STOP_LENGTH} characters are accepted")
    return stops


def _biases(value: Any) -> Any:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"must be an object of at most {MAX_LOGIT_BIAS} token ids")
    found = {}
    for key, bias in value.items():
        if not (isinstance(key, (str, int)) and str(key).isascii() and str(key).isdigit() and len(str(key)) < 10):
            raise ValueError("keys must be token ids, as {'42': -100}")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of token {int(key)} must be a number from -100 to 100")
        found[int(key)] = float(bias)
    return found


def _text(value: str) -> str:
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError("holds half of a surrogate pair, which is no text")
    return value


Text = Annotated[str, AfterValidator(_text)]


def _prompts(value: Any) -> Any:
    """One prompt or several, each text or token ids, as a list."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _are_ids(value):
            return [value]
        if all(isinstance(each, str) for each in value):
            return value
        if all(isinstance(each, list) and _are_ids(each) for each in value):
            return value
    raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists")


def _are_ids(values: list[Any]) -> bool:
    return all(isinstance(each, int) and not isinstance(each, bool) for each in values)


def _refused(reason: str, *harmless: Any) -> Any:
    """A field that is accepted only where it asks for nothing."""

    def check(value: Any) -> Any:
        if value is not None and value not in harmless:
            raise ValueError(f"not supported here: {reason}")
        return value

    return Annotated[Any, BeforeValidator(check), Field(default=None)]


class _Model(BaseModel):
    # Numbers in quotes are no numbers; typing mistakes are no parameters.
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


class StreamOptions(_Model):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's
    include_obfuscation: bool | None = None


class GenerationRequest(_Model):
    """What chats and plain completions have in common."""

    model: Annotated[str, Field(max_length=1000)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    stop: Annotated[list[str], BeforeValidator(_stops)] = []
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[int, float], BeforeValidator(_biases)] = {}
    user: Annotated[str, Field(max_length=512)] | None = None
    # vLLM's
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=1000)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=_MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    priority: Annotated[int, Field(gt=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    response_format: Data | None = None
    # OpenAI's, for services around the model: without effect here
    metadata: Data | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Data | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.response_format is not None and self.response_format.get("type") not in _FORMS:
            raise ValueError(f"response_format.type must be one of {', '.join(_FORMS)}")
        return self

    @property
    def num_samples(self) -> int:
        return self.n or 1

    @property
    def token_limit(self) -> int | None:
        """New tokens at most, where the client said so."""
        return self.max_tokens

    @property
    def limit_field(self) -> str:
        """Where the client says so."""
        return "max_tokens"

    @property
    def num_logprobs(self) -> int | None:
        """As ``vattn.Request.num_logprobs``."""
        raise NotImplementedError

    def sampling(self, seed: int) -> Sampling:
        """With OpenAI's defaults; ``seed`` where the client gave none."""
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sampling(
            temperature=temperature,
            top_k=max(self.top_k or 0, 0),
            top_p=1.0 if self.top_p is None else max(self.top_p, 1e-9),  # 0 keeps the likeliest
            min_p=self.min_p or 0.0,
            seed=seed if self.seed is None else self.seed % _INT64,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.logit_bias,
            min_new_tokens=self.min_tokens or 0,
        )


_NO_SOUND = "this server reads and writes text"


class ChatRequest(GenerationRequest):
    """``/v1/chat/completions``."""

    messages: Annotated[list[Data], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Data], Field(max_length=128)] | None = None
    tool_choice: Annotated[Any, AfterValidator(_plain)] = None  # checked with the tools
    parallel_tool_calls: bool | None = None
    # vLLM's
    add_generation_prompt: bool | None = None
    chat_template_kwargs: Data | None = None
    # OpenAI's, without effect here
    reasoning_effort: str | None = None
    verbosity: str | None = None
    prediction: Data | None = None
    # OpenAI's, refused where they ask for something
    modalities: _refused(_NO_SOUND, ["text"])  # type: ignore[valid-type]
    audio: _refused(_NO_SOUND)  # type: ignore[valid-type]
    functions: _refused("use tools")  # type: ignore[valid-type]
    function_call: _refused("use tool_choice", "none", "auto")  # type: ignore[valid-type]
    web_search_options: _refused("this server searches nothing")  # type: ignore[valid-type]
    moderation: _refused("this server moderates nothing")  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _fits(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice needs tools")
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def limit_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    """``/v1/completions``."""

    prompt: Annotated[list[Text | list[int]], BeforeValidator(_prompts), Field(max_length=MAX_CHOICES)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_special_tokens: bool | None = None  # vLLM's
    echo: _refused("the answer holds new text only; join it to the prompt", False)  # type: ignore[valid-type]
    suffix: _refused("models here continue a text, and do not fill a gap", "")  # type: ignore[valid-type]
    best_of: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.num_samples:
            raise ValueError("best_of is not supported here: ask for n answers and choose")
        if len(self.prompt) * self.num_samples > MAX_CHOICES:
            raise ValueError(f"n answers to each prompt are more than {MAX_CHOICES}")
        return self

    @property
    def token_limit(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class TokenizeRequest(_Model):
    """``/tokenize``, as vLLM's: a text or a chat."""

    model: Annotated[str, Field(max_length=1000)] | None = None
    prompt: Text | None = None
    messages: Annotated[list[Data], Field(min_length=1, max_length=10_000)] | None = None
    tools: Annotated[list[Data], Field(max_length=128)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: Data | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either a prompt or messages")
        return self
