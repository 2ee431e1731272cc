"""The seccomp filter of sandboxed programs, assembled as BPF.

Refused calls (which programs do not need, and which have had kernel holes) fail with EPERM; calls newer than this list
and other calling conventions fail with ENOSYS.
"""

from __future__ import annotations

import errno
import struct
from typing import NamedTuple

_LOAD_WORD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16

_NEWEST_CALL = 462
"""mseal, Linux 6.10."""
_X32_CALLS = 0x40000000
_NEW_NAMESPACES = 0x7E020080
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, and NEWTIME in the exit signal bits."""
_AF_UNIX = 1
_FAKE_TERMINAL_INPUT = (0x5412, 0x541C)
"""TIOCSTI and TIOCLINUX."""

# Call numbers on x86_64 and aarch64 (-1: does not exist).
_REFUSED = """
ptrace 101 117; process_vm_readv 310 270; process_vm_writev 311 271; kcmp 312 272; pidfd_getfd 438 438;
process_madvise 440 440; mount 165 40; umount2 166 39; pivot_root 155 41; chroot 161 51; open_tree 428 428;
move_mount 429 429; fsopen 430 430; fsconfig 431 431; fsmount 432 432; fspick 433 433; mount_setattr 442 442;
statmount 457 457; listmount 458 458; setns 308 268; unshare 272 97; bpf 321 280; perf_event_open 298 241;
userfaultfd 323 282; io_uring_setup 425 425; io_uring_enter 426 426; io_uring_register 427 427; keyctl 250 219;
add_key 248 217; request_key 249 218; kexec_load 246 104; kexec_file_load 320 294; init_module 175 105;
finit_module 313 273; delete_module 176 106; reboot 169 142; swapon 167 224; swapoff 168 225;
open_by_handle_at 304 265; name_to_handle_at 303 264; fanotify_init 300 262; quotactl 179 60; quotactl_fd 443 443;
acct 163 89; syslog 103 116; personality 135 92; settimeofday 164 170; clock_settime 227 112; adjtimex 159 171;
clock_adjtime 305 266; sethostname 170 161; setdomainname 171 162; vhangup 153 58; iopl 172 -1; ioperm 173 -1;
modify_ldt 154 -1; uselib 134 -1; ustat 136 -1; sysfs 139 -1; _sysctl 156 -1; lookup_dcookie 212 18;
nfsservctl 180 42; migrate_pages 256 238; move_pages 279 239; mbind 237 235; set_mempolicy 238 237;
memfd_create 319 279; memfd_secret 447 447; shmget 29 194; msgget 68 186; semget 64 190; mq_open 240 180
"""


class _Machine(NamedTuple):
    audit_code: int
    column: int
    clone: int
    clone3: int
    socket: int
    socketpair: int
    ioctl: int


_MACHINES = {
    "x86_64": _Machine(0xC000003E, 1, clone=56, clone3=435, socket=41, socketpair=53, ioctl=16),
    "aarch64": _Machine(0xC00000B7, 2, clone=220, clone3=435, socket=198, socketpair=199, ioctl=29),
}


def refused_calls(machine: str) -> dict[str, int]:
    """The calls refused with any arguments, by name."""
    rows = (entry.split() for entry in _REFUSED.split(";"))
    numbers = {row[0]: int(row[_MACHINES[machine].column]) for row in rows}
    return {name: number for name, number in numbers.items() if number >= 0}


def supports(machine: str) -> bool:
    return machine in _MACHINES


def build_filter(machine: str) -> bytes:
    """The filter for a supported machine, as an array of ``struct sock_filter`` for ``bwrap --seccomp``."""
    calls = _MACHINES[machine]
    program = [
        _step(_LOAD_WORD, _ARCHITECTURE),
        _step(_JUMP_EQUAL, calls.audit_code, 1, 0),
        _step(_RETURN, _KILL_PROCESS),
        _step(_LOAD_WORD, _NUMBER),
        *_unless_below(_X32_CALLS, errno.ENOSYS),
        *_unless_below(_NEWEST_CALL + 1, errno.ENOSYS),
        # Its flags are in memory, which a filter cannot read; libraries fall back to clone.
        *_if_equal(calls.clone3, errno.ENOSYS),
    ]
    for number in refused_calls(machine).values():
        program += _if_equal(number, errno.EPERM)
    program += _if_argument(calls.clone, 0, [_step(_JUMP_ANY_BIT, _NEW_NAMESPACES, 0, 1), _fail(errno.EPERM)])
    for call in (calls.socket, calls.socketpair):
        program += _if_argument(call, 0, [_step(_JUMP_EQUAL, _AF_UNIX, 1, 0), _fail(errno.EPERM)])
    tests = [step for request in _FAKE_TERMINAL_INPUT for step in _if_equal(request, errno.EPERM)]
    program += _if_argument(calls.ioctl, 1, tests)
    return b"".join([*program, _step(_RETURN, _ALLOW)])


def _step(code: int, value: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, jump_true, jump_false, value)


def _fail(number: int) -> bytes:
    return _step(_RETURN, _FAIL | number)


def _if_equal(value: int, error: int) -> list[bytes]:
    return [_step(_JUMP_EQUAL, value, 0, 1), _fail(error)]


def _unless_below(value: int, error: int) -> list[bytes]:
    return [_step(_JUMP_AT_LEAST, value, 0, 1), _fail(error)]


def _if_argument(call: int, index: int, tests: list[bytes]) -> list[bytes]:
    """Test the lower half of a call's argument, then reload the call's number."""
    body = [_step(_LOAD_WORD, _ARGUMENTS + 8 * index), *tests, _step(_LOAD_WORD, _NUMBER)]
    return [_step(_JUMP_EQUAL, call, 0, len(body)), *body]
