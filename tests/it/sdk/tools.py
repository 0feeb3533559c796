"""Calls of functions through the openai package.

Usage: tools.py BASE_URL API_KEY BASE_MODEL. Prints `done` when everything was as it should be.
"""

import json
import sys
from typing import Literal

import openai
from pydantic import BaseModel

base_url, api_key, base = sys.argv[1:]
client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0)


class City(BaseModel):
    name: Literal["Bern", "Basel"]


class Weather(BaseModel):
    """The weather of a city."""

    city: City
    days: Literal[1, 2, 3]


tool = openai.pydantic_function_tool(Weather, name="weather")
assert "$ref" in json.dumps(tool) and tool["function"]["strict"], tool


class Other(BaseModel):
    """Something else."""

    text: Literal["a"]


other = openai.pydantic_function_tool(Other, name="other")
ask = dict(
    model=base, messages=[{"role": "user", "content": "Weather?"}], tools=[tool, other], max_tokens=200, seed=5,
    tool_choice={"type": "function", "function": {"name": "weather"}},
)

# Whole, parsed into the class.
answer = client.chat.completions.parse(**ask)
choice = answer.choices[0]
assert choice.finish_reason == "tool_calls", answer
(call,) = choice.message.tool_calls
assert call.type == "function" and isinstance(call.function.parsed_arguments, Weather), call

# Streamed: the package's own accumulator gives the same call.
with client.chat.completions.stream(**ask) as stream:
    final = stream.get_final_completion()
(streamed,) = final.choices[0].message.tool_calls
assert final.choices[0].finish_reason == "tool_calls", final
assert streamed.function.arguments == call.function.arguments and streamed.id.startswith("call_"), final

# The next turn: the call and its result go back.
turn = [
    *ask["messages"],
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": call.id, "type": "function", "function": {"name": "weather", "arguments": call.function.arguments}}]},
    {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
]
after = client.chat.completions.create(**{**ask, "messages": turn, "tool_choice": "none", "max_tokens": 4})
assert after.choices[0].message.tool_calls is None, after
assert after.usage.prompt_tokens > 0

# One call where only one may be, of either function.
either = client.chat.completions.create(**{**ask, "tool_choice": "required", "parallel_tool_calls": False})
(one,) = either.choices[0].message.tool_calls
assert one.function.name in ("weather", "other"), one
try:
    client.chat.completions.create(**{**ask, "tool_choice": {"type": "function", "function": {"name": "none"}}})
except openai.BadRequestError as error:
    assert error.param == "tool_choice.function.name", error
else:
    raise AssertionError("an unknown function was taken")
print("done")
