"""A conversation in progress: the engine, what was said, and the settings that slash commands change."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

from cli.chat.room import OnFull, left_out_note, make_room, results_with_room
from cli.connect.engine import ServedEngine
from cli.shared.errors import REFUSALS, TERMINATED, explain
from cli.shared.options import EngineOptions
from cli.shared.thinking import Think
from cli.terminal.answer import Answer, ending, lossy_fact, play, stats_line
from cli.terminal.display import Display
from cli.terminal.meter import SweepMeter
from cli.terminal.screen import Screen
from specexec.sampling.params import SamplingParams
from specexec.text.messages import Content, Message, content_of, pictures_of, question, text_in

if TYPE_CHECKING:
    from cli.chat.archive import Record
    from cli.chat.engines import ChatEngine
    from cli.chat.raw import RawConversation
    from cli.chat.saving import Keeper
    from cli.connect.conversation import ServedConversation
    from cli.mcp.toolbox import Toolbox
    from specexec.stats import Burst
    from specexec.text.conversation import Conversation

    AnyConversation: TypeAlias = Conversation | RawConversation | ServedConversation

BELL_S = 10.0  # a shorter answer was waited for
NOTIFY_S = 5.0
MOST_ROUNDS = 25  # of calls after one message
RESULT_SHARE = 2  # characters of results for each token of the context: half of it or more is left
TAKEN_BACK = "  the question is taken back; /retry asks it again"


@dataclass
class Session:
    """One per interactive run; chat and repl differ only in their `conversation`."""

    engine: ChatEngine
    conversation: AnyConversation
    screen: Screen
    sampling: SamplingParams
    options: EngineOptions = field(default_factory=EngineOptions)
    display: Display = field(default_factory=Display)
    bell: bool = False
    notify_command: str | None = None
    think: Think = "auto"
    on_full: OnFull = "stop"
    once: bool = False  # one question: nobody can type a command afterwards
    keeper: Keeper | None = None
    tools: Toolbox | None = None
    attached: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)  # data: URLs, for the next message
    last: Answer | None = None
    leaving: bool = False
    switch: EngineOptions | None = None  # what to load and continue with

    def send(self, text: str) -> None:
        """Answer a message, with the files that were read for it in front."""
        message = content_of("\n\n".join([*self.attached, text]), self.pictures)
        self.attached.clear()
        self.pictures.clear()
        self._ask(message, self.sampling)

    def begin_anew(self) -> str | None:
        """Leave this conversation and begin another; the id under which this one is kept, if it is."""
        self.attached.clear()
        self.last = None
        if self.keeper is None:
            self.conversation.clear()
            return None
        self.keeper.leave(for_now=True)
        left, self.keeper = self.keeper.record, self.keeper.anew()
        self.conversation = self.keeper.conversation
        return left.id if left.messages else None

    def proceed(self) -> None:
        """Continue an answer that was cut short."""
        if not self.conversation.can_proceed:
            self.screen.tell("nothing to continue: the last answer ended by itself")
        else:
            self._answer(self.conversation.proceed(self.sampling))

    def keep(self) -> None:
        """Put what was said on the disk, if this conversation is kept."""
        if self.keeper is not None:
            self.keeper.save()

    def take_up(self, record: Record) -> None:
        """Leave this conversation and continue one that was kept."""
        assert self.keeper is not None
        self.keeper.leave(for_now=True)
        self.keeper = self.keeper.successor(record)
        self.conversation = self.keeper.conversation
        self.last = None

    def moved(self, engine: ChatEngine, conversation: AnyConversation, options: EngineOptions) -> Session:
        """The same conversation and settings with another engine."""
        conversation.system, conversation.messages = self.conversation.system, [*self.conversation.messages]
        if options.model == self.options.model:  # another model may have a longer context
            conversation.left_out = self.conversation.left_out
        return replace(self, engine=engine, conversation=conversation, options=options, switch=None)

    def leave(self) -> None:
        """Keep everything that makes going on cheap."""
        if self.keeper is not None:
            self.keeper.leave(for_now=self.switch is not None)

    def retry(self, seed: int | None) -> None:
        """Answer the last message again, with exactly `seed` or one that the engine derives."""
        if seed is None and self.conversation.unanswered is not None:
            self._ask(self.conversation.unanswered, self.sampling)
        elif seed is None:
            self._answer(self.conversation.retry(self.sampling))
        elif (asked := self._last_content) is not None:
            self._instead(asked, replace(self.sampling, seed=seed))

    @property
    def last_question(self) -> str | None:
        """What was asked last, answered or not; without its images."""
        asked = self._last_content
        return None if asked is None else text_in(asked)

    @property
    def _last_content(self) -> Content | None:
        if self.conversation.unanswered is not None:
            return self.conversation.unanswered
        asked = [message for message in self.conversation.messages if message["role"] in ("user", "prompt")]
        last = asked[-1]["content"] if asked else None
        return last if last is None or isinstance(last, list) else str(last)

    @property
    def last_answer(self) -> dict[str, object]:
        """The message that was written last."""
        answers = [one for one in self.conversation.messages if one["role"] in ("assistant", "completion")]
        return answers[-1] if answers else {}

    def ask_again(self, text: str) -> None:
        """Put another question in the place of the last one, about the same images."""
        self._instead(content_of(text, pictures_of(self._last_content)), self.sampling)

    def _instead(self, text: Content, sampling: SamplingParams) -> None:
        conversation = self.conversation
        messages, left_out = [*conversation.messages], conversation.left_out
        conversation.undo()
        self._ask(text, sampling)
        if conversation.unanswered is not None:  # nothing came in the place of what there was
            conversation.messages, conversation.left_out = messages, left_out

    def play(self, bursts: Iterator[Burst]) -> Answer:
        """Print an answer as it comes."""
        self.screen.markdown = (
            self.display.markdown and not self.display.tree
        )  # a block is not to be torn apart by pictures
        meter = SweepMeter(self.engine, lambda: self.conversation.tokens_used)
        return play(
            self.engine, self._kept(bursts), self.screen, meter,
            tree=self.display.tree, hide_thoughts=self.display.hide_thinking, calls_run=self.tools is not None,
        )  # fmt: skip

    def _ask(self, content: Content, sampling: SamplingParams) -> None:
        """Answer a question, in the room that the context has for it."""
        try:
            room = make_room(self, [question(content)])
        except REFUSALS as refusal:
            self.screen.tell(explain(refusal))
            room = False
        if room:
            self._answer(self.conversation.send(content, sampling))
        else:
            self.conversation.unanswered = content
            self.screen.say(TAKEN_BACK)

    def exchange(
        self, bursts: Iterator[Burst], played: Callable[[Iterator[Burst]], Answer] | None = None
    ) -> Iterator[Answer]:
        """Play an answer and sum it up, or do what `played` does; then the same for those that follow called tools."""
        for _ in range(MOST_ROUNDS):
            answer = (played or self._summed_up)(bursts)
            yield answer
            results = self._results(answer)
            if results is None:
                return
            bursts = self.conversation.go_on(results, self.sampling)
        self.screen.tell(f"  stopped after {MOST_ROUNDS} rounds of calls; a message makes it go on")

    def _summed_up(self, bursts: Iterator[Burst]) -> Answer:
        answer = self.play(bursts)
        self.report(answer)
        return answer

    def _results(self, answer: Answer) -> list[Message] | None:
        """What the tools gave that an answer called; None if there is nothing to go on with."""
        calls = self.last_answer.get("tool_calls")
        if self.tools is None or answer.finish_reason != "stop" or not isinstance(calls, list):
            return None
        results = self.tools.run(calls, RESULT_SHARE * self.engine.context // len(calls))
        fitting = None if results.stopped else results_with_room(self, results)
        if fitting is None:
            self.conversation.messages = [*self.conversation.messages, *results.messages]
        self.keep()
        return fitting

    def _answer(self, bursts: Iterator[Burst]) -> None:
        """Play an answer and what follows it."""
        self.screen.title("●")
        seconds = 0.0
        try:
            for answer in self.exchange(bursts):
                self.last = answer
                seconds += answer.seconds
                self.leaving = answer.exit_code == TERMINATED
        except REFUSALS as refusal:
            # The conversation outlives a message that cannot be answered.
            self.screen.end_line()
            self.screen.tell(explain(refusal))
            return
        finally:
            self.screen.title("✓")
        if seconds > BELL_S:
            self._call()
        if self.conversation.unanswered is not None and not self.once:
            self.screen.say(TAKEN_BACK)

    def _call(self) -> None:
        """Signal to a user who may look elsewhere that the answer is there."""
        if self.bell:
            self.screen.ring()
        if self.notify_command:
            try:
                subprocess.run(self.notify_command, shell=True, check=True, capture_output=True, timeout=NOTIFY_S)
            except subprocess.SubprocessError as problem:
                self.screen.tell(f"Note: --notify-command: {problem}")

    def _kept(self, bursts: Iterator[Burst]) -> Iterator[Burst]:
        """The same bursts; what they wrote is on the disk a second later, whatever happens to us."""
        saved_s = 0.0
        for burst in bursts:
            yield burst
            if time.monotonic() - saved_s > 1:
                self.keep()
                saved_s = time.monotonic()

    def report(self, answer: Answer) -> None:
        """Say how the answer ended and, unless switched off, what it cost."""
        if isinstance(self.engine, ServedEngine) and self.engine.notes:
            self.screen.say(f"  {self.engine.notes}")
        if note := ending(answer, self.sampling.max_tokens, self.engine.context, once=self.once):
            self.screen.say(note)
        if self.conversation.left_out.messages:
            self.screen.say(f"  {left_out_note(self.conversation)}")
        if self.display.stats and answer.tokens:
            sampled = self.sampling.temperature != 0
            limit_Bps, lossy = self.options.load.link_limit_Bps, self.engine.lossy
            self.screen.say(stats_line(answer, sampled=sampled, link_limit_Bps=limit_Bps, lossy=lossy))
        elif self.engine.lossy and answer.tokens:
            self.screen.say(f"  {lossy_fact(answer, self.engine.lossy)}")
