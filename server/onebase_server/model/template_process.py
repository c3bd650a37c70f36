"""Renders chat templates that came with adapters, in a process of its own that ends where they take too much.

A template is a program, and Jinja's sandbox keeps it from the server's objects, not from its time and memory. Started
by `api.template_processes`; it reads a line of JSON on stdin for each conversation and answers each with one on stdout.
It knows neither HTTP nor adapters.
"""

import json
import resource
import signal
import sys
from typing import Any

from onebase_server.errors import OnebaseError
from onebase_server.model.chat_template import ChatTemplate

RENDER_SECONDS = 2.0
"""By the clock; what templates do takes milliseconds."""
MEMORY_BYTES = 256 << 20
"""Of address space, Python and Jinja included, which take a tenth of it."""
MAX_PROMPT_CHARACTERS = 4 << 20
"""More than any context holds."""


def render(source: str, messages: list[dict[str, Any]], variables: dict[str, Any]) -> dict[str, str]:
    """The answer to one conversation: `prompt`, or `error`, a sentence for the request."""
    try:
        prompt = ChatTemplate(source).render(messages, **variables)
    except OnebaseError as error:
        return {"error": error.message}
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        return {"error": f"The model's chat template made {len(prompt):,} characters of these messages."}
    return {"prompt": prompt}


def main() -> None:
    """Entry point of the process; it ends with its stdin, or by SIGALRM within a conversation that takes too long."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it may reach the whole group; the API process decides
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, RENDER_SECONDS)
        answer = json.dumps(render(**json.loads(line))).encode()
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
