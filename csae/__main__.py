"""The program `csae`, and `python -m csae`: whatever comes ends in one line that tells what to do, and an exit code.

0: done. 1: nobody reads the output any more. 2: what a person can mend. 128 and the number of a signal: stopped by
it, 130 after Ctrl-C. Nothing that takes long is imported before Ctrl-C is in hand.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def main() -> None:
    """Runs the command line on sys.argv. Raises SystemExit where it does not end well."""
    stop = _Stop()
    # Not in a thread of another program. What the caller has ignored stays ignored: nohup, a job in the background.
    handled = {}
    for number in SIGNALS:
        if _in_main_thread() and signal.getsignal(number) not in (signal.SIG_IGN, None):
            handled[number] = signal.signal(number, stop)
    hook, sys.unraisablehook = sys.unraisablehook, stop.again
    try:
        code = _run(stop)
    finally:
        import atexit

        atexit.register(_ignore_signals)  # the first to run: the others take a while
        sys.unraisablehook = hook
        for number, handler in handled.items():
            signal.signal(number, handler)
    if code:
        sys.exit(code)


class _Stop:
    """What a signal does, and which one came."""

    importing = True
    by: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.by = number
        if self.importing:  # half of a library that is imported may not be able to end in order
            _say("\ncsae: interrupted")
            os._exit(128 + number)
        raise KeyboardInterrupt

    def again(self, unraisable: sys.UnraisableHookArgs) -> None:
        """An exception that Python can't raise where it came up; Ctrl-C must not get lost there."""
        from threading import Timer

        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            sys.__unraisablehook__(unraisable)
        elif self.by is not None:
            Timer(0.05, os.kill, (os.getpid(), self.by)).start()


def _run(stop: _Stop) -> int:
    try:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # no name that someone gave a file may be the end of the work
                stream.reconfigure(errors="backslashreplace")
        from csae.cli import cli

        stop.importing = False
        cli(prog_name="csae", standalone_mode=False)
        sys.stdout.flush()
    except SystemExit:
        raise
    except BaseException as error:
        _ignore_signals()  # a second Ctrl-C would end in a traceback; `main` hears again when all is said
        told = _told(error, stop.by)
        if _is_one_of_several():
            from csae.distributed.telling import end

            end(error, told)
        if told is None:
            raise
        line, code = told
        if line is not None:
            _say(line)
        return code
    return 0


def _told(error: BaseException, stopped_by: int | None) -> tuple[str | None, int] | None:
    """What to say of what happened, and the exit code; None for an error of our own."""
    import click

    from csae.errors import Stopped, UserError, memory_problem, shown
    from csae.files import disk_problem

    if isinstance(error, Stopped):
        return f"\ncsae: {shown(error)}", 128 + signal.SIGINT
    if stopped_by is not None or isinstance(error, click.Abort | KeyboardInterrupt):
        return "\ncsae: interrupted", 128 + (stopped_by or signal.SIGINT)
    if isinstance(error, BrokenPipeError):  # whoever read the output has seen enough
        _drop_what_nobody_reads()
        return None, 1
    if isinstance(error, UserError):
        return f"csae: {shown(error)}", 2
    if isinstance(error, click.ClickException):
        context = error.ctx if isinstance(error, click.UsageError) else None
        usage = ""
        if context is not None:
            usage = f"{context.get_usage()}\nTry '{context.command_path} {context.help_option_names[0]}' for help.\n\n"
        return f"{usage}Error: {shown(error.format_message())}", 2
    memory = memory_problem(error)
    if memory is not None:
        needed = "needed a smaller --d-sae, --batch-windows or --n-ctx, a smaller model, or another device"
        return f"csae: {memory}: {needed}", 2
    reason = disk_problem(error, "use")
    if reason is None:
        return None
    file = error.filename if isinstance(error, OSError) else None
    return f"csae: {reason}" if file is None else f"csae: {shown(os.fsdecode(file))}: {reason}", 2


def _is_one_of_several() -> bool:
    """Whether torchrun started other processes beside this one."""
    return os.environ.get("WORLD_SIZE", "") not in ("", "0", "1")


def _drop_what_nobody_reads() -> None:
    """What is written at the end of the process to a closed pipe goes nowhere."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (OSError, ValueError):
            pass


def _say(line: str) -> None:
    try:  # in one write, as csae.progress.say, which is not imported yet where a signal comes early
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    except (OSError, ValueError):  # nobody is there to read it
        pass


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


def _ignore_signals() -> None:
    for number in SIGNALS if _in_main_thread() else ():
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    main()
