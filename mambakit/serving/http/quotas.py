"""What each key has left of its limits: texts at once, requests and tokens a minute."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from mambakit.serving.errors import ApiError
from mambakit.serving.http.keys import Key


class _Bucket:
    """A rate with bursts: a minute's worth, refilled all the time."""

    def __init__(self, per_minute: int, now: float):
        self.per_minute, self._level, self._since = per_minute, float(per_minute), now

    def wait(self, amount: float, now: float) -> float:
        """Seconds until there is ``amount``, or all that it ever holds."""
        self._level = min(self.per_minute, self._level + (now - self._since) * self.per_minute / 60)
        self._since = now
        return max(0.0, (min(amount, self.per_minute) - self._level) * 60 / self.per_minute)

    def take(self, amount: float) -> None:
        """Negative to give back."""
        self._level -= amount


@dataclass
class _Account:
    texts: int = 0
    requests: _Bucket | None = None
    tokens: _Bucket | None = None


class Grant:
    """One admitted request; `end` it, however that was, or `withdraw` it where it was refused elsewhere."""

    def __init__(self, account: _Account | None, texts: int, prompt_tokens: int, most_tokens: int):
        self.prompt_tokens = prompt_tokens
        self._account, self._texts, self._counted = account, texts, prompt_tokens + most_tokens

    def end(self, tokens: int) -> None:
        """``tokens``: of its texts, as they were."""
        self._end(self.prompt_tokens + tokens)

    def withdraw(self) -> None:
        if self._account is not None and self._account.requests is not None:
            self._account.requests.take(-1)
        self._end(0)

    def _end(self, used: int) -> None:
        account, self._account = self._account, None
        if account is None:
            return
        account.texts -= self._texts
        if account.tokens is not None:
            account.tokens.take(used - self._counted)


class Quotas:
    """The accounts of all keys, by name, so that a key that is replaced by one of the same name has its account."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    def admit(self, key: Key | None, texts: int, prompt_tokens: int, most_tokens: int = 0) -> Grant:
        """Count a request.

        Args:
            key: None has no limits.
            texts: of the request.
            prompt_tokens: of its prompts.
            most_tokens: that its texts may have.

        Raises:
            ApiError: 429; the request is not counted.
        """
        if key is None:
            return Grant(None, texts, prompt_tokens, most_tokens)
        now, quota, tokens = self._clock(), key.quota, prompt_tokens + most_tokens
        account = self._account(key, now)
        if quota.texts is not None and account.texts + texts > quota.texts:
            if texts > quota.texts:
                message = f"the request has {texts} texts; key {key.name} may have {quota.texts} at once: ask for fewer"
                raise ApiError(429, message, code="rate_limit_exceeded")
            message = (
                f"key {key.name} has {account.texts} texts, and {texts} more are too many; at most {quota.texts} may "
                "be written and wait at once: try again when one has ended"
            )
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after=1)
        wanted = ((account.requests, 1, "requests"), (account.tokens, tokens, "tokens"))
        for bucket, amount, what in wanted:
            if bucket is not None and (wait := bucket.wait(amount, now)) > 0:
                seconds = math.ceil(wait)
                message = (
                    f"key {key.name} has used its {bucket.per_minute:,} {what} a minute, and this request needs "
                    f"{amount:,}; try again in {seconds} s"
                )
                raise ApiError(429, message, code="rate_limit_exceeded", retry_after=seconds)
        account.texts += texts
        for bucket, amount, _ in wanted:
            if bucket is not None:
                bucket.take(amount)
        return Grant(account, texts, prompt_tokens, most_tokens)

    def _account(self, key: Key, now: float) -> _Account:
        account = self._accounts.setdefault(key.name, _Account())
        for name in ("requests", "tokens"):
            rate, bucket = getattr(key.quota, f"{name}_per_minute"), getattr(account, name)
            if rate is None:
                setattr(account, name, None)
            elif bucket is None or bucket.per_minute != rate:  # new, or changed by a reload
                setattr(account, name, _Bucket(rate, now))
        return account
