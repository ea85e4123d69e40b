"""What goes wrong in reinforcement while the loss looks well: seen in the metrics, and said once with what to do."""

from collections.abc import Callable, Mapping

from .callbacks import Callback, Record
from .loop import Run

WINDOW = 20  # steps that must agree
HIGHEST_KL = 1.0  # nats a token: most tokens are other ones by then


class Watch(Callback):
    """Tells of rewards that teach nothing more, answers that grow without an end, and a policy that has run away.
    tell: is given a sentence."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        self.tell, self.seen, self.told = tell, list[Mapping[str, float | None]](), set[str]()

    def on_step(self, run: Run, record: Record) -> None:
        self.seen = [*self.seen[1 - WINDOW :], dict(record)]
        if len(self.seen) < WINDOW:
            return
        signal, reward, kl, truncated = (self._mean(name) for name in ("signal", "reward", "kl", "truncated"))
        self._say(
            "signal",
            "signal" in self.seen[-1] and signal < 0.1,
            f"notice: in {1 - signal:.0%} of the groups all answers earn the same (mean reward {reward:.3g}), so "
            "little is learned: take harder or easier prompts, a finer reward, a higher temperature, or resample",
        )
        self._say(
            "length",
            truncated > 0.5 and self._mean("answer_tokens", -5) > 1.5 * self._mean("answer_tokens", 5),
            f"notice: answers grow, and {truncated:.0%} have no end: give truncated_penalty, a reward for length "
            "(words), or truncated mask",
        )
        self._say(
            "kl",
            kl > HIGHEST_KL,
            f"notice: the policy is {kl:.2g} nats a token from its reference: look at samples before you trust the "
            "reward; a lower lr, a higher kl or kl_stop hold it",
        )

    def _mean(self, name: str, part: int | None = None) -> float:
        """Of the window, of its first so many steps, or below 0 its last; 0 where the run has no such metric."""
        some = self.seen if part is None else self.seen[:part] if part > 0 else self.seen[part:]
        values = [value for record in some if (value := record.get(name)) is not None]
        return sum(values) / len(values) if values else 0.0

    def _say(self, kind: str, happens: bool, sentence: str) -> None:
        if happens and kind not in self.told:
            self.told.add(kind)
            self.tell(sentence)
