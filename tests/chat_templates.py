"""Chat templates in the styles of the field, and what each makes of an assistant's turn.

They are short, but put text, and rewrite it, where the real ones do: each note says what is hard about the style. No text in them begins
with a newline right after a block, because the renderer would take that away.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hone.chat import CHATML

Message = dict[str, Any]

LLAMA3 = (
    "{% set has_system = messages and messages[0]['role'] == 'system' %}"
    "{% set rest = messages[1:] if has_system else messages %}"
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "{{ 'Environment: ipython\\n' if tools }}Today Date: 26 Jul 2024\n\n{{ messages[0]['content'] | trim if has_system }}<|eot_id|>"
    "{% if tools %}<|start_header_id|>user<|end_header_id|>\n\nRespond with JSON for a function call.\n\n"
    "{% for tool in tools %}{{ tool | tojson(indent=4) }}\n\n{% endfor %}{{ rest[0]['content'] | trim }}<|eot_id|>"
    "{% set rest = rest[1:] %}{% endif %}"
    "{% for m in rest %}{% set role = 'ipython' if m['role'] == 'tool' else m['role'] %}"
    "<|start_header_id|>{{ role }}<|end_header_id|>\n\n"
    "{% if 'tool_calls' in m %}{% if m['tool_calls'] | length != 1 %}{{ raise_exception('one call at once') }}{% endif %}"
    "{% set call = m['tool_calls'][0]['function'] %}"
    '{"name": "{{ call["name"] }}", "parameters": {{ call["arguments"] | tojson }}}'
    "{% elif role == 'ipython' %}{{ m['content'] | tojson }}{% else %}{{ m['content'] | trim }}{% endif %}<|eot_id|>{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' if add_generation_prompt }}"
)
"""Of 3.1: tools come with the first question, content is trimmed, and is dropped beside a call."""

MISTRAL = (
    "{% set has_system = messages and messages[0]['role'] == 'system' %}"
    "{% set rest = messages[1:] if has_system else messages %}"
    "{% set questions = rest | selectattr('role', 'equalto', 'user') | list %}"
    "{% set turns = namespace(n=0) %}"
    "{% for m in rest if m['role'] != 'tool' and 'tool_calls' not in m %}"
    "{% if (m['role'] == 'user') != (turns.n % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set turns.n = turns.n + 1 %}{% endfor %}<s>"
    "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{% if tools and m == questions[-1] %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {{ messages[0]['content'] + '\\n\\n' if has_system and loop.last }}{{ m['content'] }}[/INST]"
    "{% elif 'tool_calls' in m %}[TOOL_CALLS] [{% for call in m['tool_calls'] %}"
    "{% if call['id'] | length != 9 %}{{ raise_exception('ids must be of length 9') }}{% endif %}"
    '{{ (call["function"] | tojson)[:-1] }}, "id": "{{ call["id"] }}"}{{ ", " if not loop.last }}{% endfor %}]</s>'
    "{% elif m['role'] == 'tool' %}[TOOL_RESULTS] {{ {'content': m['content']} | tojson }}[/TOOL_RESULTS]"
    "{% else %} {{ m['content'] | trim }}</s>{% endif %}{% endfor %}"
)
"""Of 7B v0.3 and Nemo: tools stand before the last question only, the system turn in the last question only and only while that has no
answer, the space before an answer is the model's, and calls do not count where roles must alternate."""

MISTRAL_FIRST = (
    "{% set has_system = messages and messages[0]['role'] == 'system' %}<s>"
    "{% for m in (messages[1:] if has_system else messages) %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %} [INST] {{ messages[0]['content'] + '\\n\\n' if has_system and loop.first }}{{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
"""Of 7B v0.1 and Mixtral: the system turn stands in the first question, and there are no tools."""

GEMMA = (
    "{% set has_system = messages and messages[0]['role'] == 'system' %}<bos>"
    "{% for m in (messages[1:] if has_system else messages) %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ messages[0]['content'] + '\\n\\n' if has_system and loop.first }}{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{{ '<start_of_turn>model\\n' if add_generation_prompt }}"
)
"""Of 3: the assistant is the model, content is trimmed, the system turn stands in the first question, and there are no tools."""

_QWEN_OPENING = (
    "{% set has_system = messages and messages[0]['role'] == 'system' %}"
    "{% if tools or has_system or DEFAULT %}<|im_start|>system\n{{ messages[0]['content'] if has_system else DEFAULT }}"
    "{% if tools %}{{ '\\n\\n# Tools\\n\\n<tools>\\n' }}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools>{% endif %}"
    "<|im_end|>\n{% endif %}"
)
_QWEN_RESULT = (
    "{{ '<|im_start|>user' if messages[loop.index0 - 1]['role'] != 'tool' }}\n<tool_response>\n{{ m['content'] }}\n</tool_response>"
    "{{ '<|im_end|>\\n' if loop.last or messages[loop.index0 + 1]['role'] != 'tool' }}"
)
_QWEN_CALLS = (
    "{% for call in m['tool_calls'] or [] %}{{ '\\n' if m['content'] or not loop.first }}<tool_call>\n"
    '{"name": "{{ call["function"]["name"] }}", "arguments": {{ call["function"]["arguments"] | tojson }}}\n</tool_call>{% endfor %}'
)

QWEN2_5 = (
    _QWEN_OPENING.replace("DEFAULT", "'You are Qwen.'")
    + "{% for m in messages %}{% if m['role'] == 'tool' %}"
    + _QWEN_RESULT
    + "{% elif not (has_system and loop.first) %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    + _QWEN_CALLS
    + "<|im_end|>\n{% endif %}{% endfor %}{{ '<|im_start|>assistant\\n' if add_generation_prompt }}"
)
"""Tools stand in the system turn, of which there always is one, and results of tools together in a turn of the user."""

QWEN3 = (
    _QWEN_OPENING.replace("DEFAULT", "''")
    + "{% set last = namespace(question=-1) %}"
    + "{% for m in messages %}{% if m['role'] == 'user' %}{% set last.question = loop.index0 %}{% endif %}{% endfor %}"
    + "{% for m in messages %}{% if m['role'] == 'tool' %}"
    + _QWEN_RESULT
    + "{% elif not (has_system and loop.first) %}<|im_start|>{{ m['role'] }}\n"
    + "{% set thought, answer = '', m['content'] %}"
    + "{% if m['role'] == 'assistant' and '</think>' in answer %}"
    + "{% set thought = answer.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    + "{% set answer = answer.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    + "{% if m['role'] == 'assistant' and loop.index0 > last.question and (loop.last or thought) %}"
    + "{{ '<think>\\n' + thought + '\\n</think>\\n\\n' + answer.lstrip('\\n') }}{% else %}{{ answer }}{% endif %}"
    + _QWEN_CALLS
    + "<|im_end|>\n{% endif %}{% endfor %}{{ '<|im_start|>assistant\\n' if add_generation_prompt }}"
)
"""As 2.5, and thinking is written after the last question only, where the last turn has a block of it in any case."""

Written = Callable[[Message, bool], str]


def trimmed(closing: str, *, opening: str = "") -> Written:
    """Answers without the blanks around them."""
    return lambda message, _: opening + message["content"].strip() + closing


def verbatim(closing: str, *, opening: str = "") -> Written:
    """Answers as they are."""
    return lambda message, _: opening + message["content"] + closing


def after_thinking(message: Message, is_last: bool) -> str:
    """Answers as they are, but for the last turn's empty block of thinking."""
    content = message["content"]
    return ("<think>\n\n</think>\n\n" + content.lstrip("\n") if is_last else content) + "<|im_end|>"


def tagged_calls(message: Message, is_last: bool) -> str:  # noqa: ARG001
    """Calls in Hermes' tags, below the content."""
    calls = [f"<tool_call>\n{_json(call['function'])}\n</tool_call>" for call in message["tool_calls"]]
    return "\n".join([message["content"]] * bool(message["content"]) + calls) + "<|im_end|>"


def tagged_calls_after_thinking(message: Message, is_last: bool) -> str:
    return ("<think>\n\n</think>\n\n" if is_last else "") + tagged_calls(message, is_last)


def json_call(message: Message, _: bool) -> str:
    """Llama 3's: one call, no content."""
    [call] = message["tool_calls"]
    return f'{{"name": "{call["function"]["name"]}", "parameters": {_json(call["function"]["arguments"])}}}<|eot_id|>'


def listed_calls(message: Message, _: bool) -> str:
    """Mistral's: a list with ids, no content."""
    return f"[TOOL_CALLS] {_json([{**call['function'], 'id': call['id']} for call in message['tool_calls']])}</s>"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Style:
    """A template, and by hand what an assistant's turn is in it: of a message, and whether that is the conversation's last."""

    template: str
    answer: Written
    call: Written | None = None
    """None where the template has no tools."""


STYLES = {
    "chatml": Style(CHATML, verbatim("<|im_end|>"), tagged_calls),
    "llama3": Style(LLAMA3, trimmed("<|eot_id|>"), json_call),
    "mistral": Style(MISTRAL, trimmed("</s>", opening=" "), listed_calls),
    "mistral-first": Style(MISTRAL_FIRST, verbatim("</s>", opening=" ")),
    "gemma": Style(GEMMA, trimmed("<end_of_turn>")),
    "qwen2.5": Style(QWEN2_5, verbatim("<|im_end|>"), tagged_calls),
    "qwen3": Style(QWEN3, after_thinking, tagged_calls_after_thinking),
}
