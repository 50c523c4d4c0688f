"""Communicators: collectives (and messages) between the ranks of a job."""

from hpc_dl.comm.choose import Choice, choose
from hpc_dl.comm.make import make
from hpc_dl.comm.protocol import ANY, Communicator, Op, PointToPoint, Status, Work
from hpc_dl.comm.serial import SerialCommunicator
from hpc_dl.comm.threads import ThreadsCommunicator, run_threads

__all__ = [
    "ANY",
    "Choice",
    "Communicator",
    "Op",
    "PointToPoint",
    "SerialCommunicator",
    "Status",
    "ThreadsCommunicator",
    "Work",
    "choose",
    "make",
    "run_threads",
]
