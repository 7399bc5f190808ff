"""A vision-language model behind an OpenAI-compatible endpoint: pictures and a question in, an answer out.

Made for Qwen2.5-VL under vLLM (vllm serve Qwen/Qwen2.5-VL-7B-Instruct --limit-mm-per-prompt '{"image": 8}').
"""

import base64
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request

from PIL import Image

from cli import UserError


class Unanswered(Exception):
    """The endpoint gave no answer, in as many tries as it gets: the clip is neither kept nor refused."""


def ask(url, model, question, pictures, timeout=60.0, tries=3):
    """The answer, stripped, of a model behind an endpoint to a question about pictures, uint8 [n, H, W, 3].

    url: up to the version, as http://localhost:8000/v1; $OPENAI_API_KEY is its key, where there is one. Unanswered
    after `tries` failures of the network or the server, each of at most about `timeout` seconds, with 1 and 2 seconds
    in between; UserError where the server refuses the question as such (no such model, too many pictures).
    """
    content = []
    for picture in pictures:
        jpeg = io.BytesIO()
        Image.fromarray(picture).save(jpeg, "JPEG", quality=92)
        data = "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
        content.append(dict(type="image_url", image_url=dict(url=data)))
    content.append(dict(type="text", text=question))
    messages = [dict(role="user", content=content)]
    body = json.dumps(dict(model=model, messages=messages, temperature=0, max_tokens=256)).encode()
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY", "").strip():
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url.rstrip("/") + "/chat/completions", body, headers)
    for attempt in range(tries):
        time.sleep(attempt)
        until, reply = time.monotonic() + timeout, b""
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                while part := response.read1(65536):
                    reply += part
                    if time.monotonic() > until or len(reply) > 1 << 20:
                        raise TimeoutError("the answer does not end")
            return json.loads(reply)["choices"][0]["message"]["content"].strip()
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                said = error.read(200).decode(errors="replace")
                raise UserError(f"--vlm {url}: {error.code} {error.reason}: {said}") from None
            problem = error
        except (OSError, http.client.HTTPException) as error:  # no connection, none in time, or a broken one
            problem = error
        except (ValueError, LookupError, TypeError, AttributeError):
            problem = f"not an answer in OpenAI's format: {reply[:80]!r}"
    raise Unanswered(f"--vlm {url}: {problem}")


def yes_or_no(answer):
    """True for yes, False for no, None for whatever else was answered."""
    return dict(yes=True, no=False).get(answer.lower().strip(" .!*\"'\n"))
