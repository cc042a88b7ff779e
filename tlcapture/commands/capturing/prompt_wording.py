"""How the prompts of a capture are worded: the chat template, its arguments and the system prompt, as asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from tlcapture.captures.known_capture import KnownCapture, conversation_of
from tlcapture.commands.capturing.options import CaptureOptions
from tlcapture.models.loading import Model, ModelOutline
from tlcapture.prompts.chat_template import NO_ARGS
from tlcapture.prompts.prompt_sets import Prompt, PromptSet
from tlcapture.prompts.template_args import template_args
from tlcapture.prompts.tokenization import TokenizedPrompt, tokenize_prompt
from tlcapture.storage.experiments.config import ExperimentConfig


class PromptWording:
    """The wording by options and config of an experiment; `model` is called only when its tokenizer is needed."""

    def __init__(
        self, options: CaptureOptions, config: ExperimentConfig, model: Callable[[], Model | ModelOutline]
    ) -> None:
        self._options = options
        self._config = config
        self._model = model

    @property
    def chat_template(self) -> bool | None:
        """Whether the chat template is used, by option or config; `None` where neither decides it."""
        option = self._options.chat_template
        return self._config.use_chat_template if option is None else option

    @cached_property
    def template_args(self) -> Mapping[str, Any]:
        """The values for the chat template; raises `InputError` for those that it cannot take, whatever the prompt."""
        options = self._options
        if options.thinking is None and not options.template_args:
            return NO_ARGS
        return template_args(
            self._model().tokenizer, options.thinking, options.template_args, chat_template=self.chat_template
        )

    def tokenized(self, prompt_set: PromptSet, prompt: Prompt) -> TokenizedPrompt:
        """The token ids of a prompt; raises `InputError` if it cannot be rendered."""
        return tokenize_prompt(
            self._model().tokenizer,
            prompt,
            prompt_set.name,
            system_prompt=self._system_prompt(prompt_set, prompt),
            chat_template=self.chat_template,
            template_args=self.template_args,
        )

    def is_that_of(self, saved: KnownCapture, prompt_set: PromptSet, prompt: Prompt) -> bool:
        """Whether a saved capture was generated from this prompt in this wording."""
        return (
            "tokens_from" not in saved.metadata
            and saved.conversation == conversation_of(prompt.text, prompt.messages)
            and saved.metadata.get("template_args", {}) == self.template_args
            and saved.metadata.get("system_prompt") == self._system_prompt(prompt_set, prompt)
            and self.chat_template in (None, saved.metadata.get("chat_template"))
        )

    def _system_prompt(self, prompt_set: PromptSet, prompt: Prompt) -> str | None:
        if self._options.system_prompt is not None:
            return self._options.system_prompt
        return prompt_set.system_prompt_of(prompt, self._config.system_prompt)
