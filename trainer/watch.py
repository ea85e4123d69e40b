"""What goes wrong in reinforcement while the loss looks well: seen in the metrics, and said once with what to do."""

from collections.abc import Callable, Sequence

from .callbacks import Callback, Record
from .loop import Run

WINDOW = 20  # steps that must agree
HIGHEST_KL = 1.0  # nats a token: most tokens are other ones by then


class Watch(Callback):
    """Tells of rewards that teach nothing more, answers that grow without an end, and a policy that has run away.
    tell: is given a sentence."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        self.tell, self.seen, self.told = tell, list[Record](), set[str]()

    def on_step(self, run: Run, record: Record) -> None:
        self.seen = [*self.seen[1 - WINDOW :], dict(record)]
        if len(self.seen) < WINDOW:
            return
        signal, reward, kl, truncated = (mean(self.seen, name) for name in ("signal", "reward", "kl", "truncated"))
        longer = mean(self.seen[-5:], "answer_tokens") / max(1.0, mean(self.seen[:5], "answer_tokens"))
        troubles = {
            "signal": (
                "signal" in self.seen[-1] and signal < 0.1,
                f"in {1 - signal:.0%} of the groups all answers earn the same (mean reward {reward:.3g}), so little is "
                "learned: take harder or easier prompts, a finer reward, a higher temperature, or resample",
            ),
            "length": (
                truncated > 0.5 and longer > 1.5,
                f"answers grow, and {truncated:.0%} have no end: give truncated_penalty, a reward for length (words), "
                "or truncated mask",
            ),
            "kl": (
                kl > HIGHEST_KL,
                f"the policy is {kl:.2g} nats a token from its reference: look at samples before you trust the reward; "
                "a lower lr, a higher kl or kl_stop hold it",
            ),
        }
        for kind, (happens, sentence) in troubles.items():
            if happens and kind not in self.told:
                self.told.add(kind)
                self.tell(f"notice: {sentence}")


def mean(records: Sequence[Record], name: str) -> float:
    """Of a metric; 0 where the run has none of that name."""
    values = [value for record in records if (value := record.get(name)) is not None]
    return sum(values) / len(values) if values else 0.0
