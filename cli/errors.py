# Copyright 2026 The ModernALBERT authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""A user's mistake is one sentence instead of a traceback."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from torch import distributed


class UserError(ValueError):
    """A mistake of the user's, said in one sentence. Commands print it and exit with code 2."""


def run(main: Callable[[], object]) -> None:
    """
    Run a command's main function.

    A `UserError` becomes one line on standard error and exit code 2, Ctrl-C exit code 130; a defect of ours keeps its
    traceback.
    """
    try:
        main()
        leave_process_group()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error.filename}: {error.strerror}.", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)


def leave_process_group() -> None:
    """
    On several processes: part. The threads of a group that is still there when Python ends may abort the process.

    Those of a destroyed one, too: it lives on with the models that were spread over it (a sharded one's for good, as
    torch keeps device meshes), and to give back the tensors of its last work they need the interpreter, which they get
    while this thread sleeps.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        time.sleep(0.5)


def first_sentence(error: Exception) -> str:
    """The first line of a library's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
