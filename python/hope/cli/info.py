"""`hope info`."""

import argparse

import torch

import hope_ext
from hope.cli.options import Commands
from hope.device import choose_device


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "info",
        help="show the build, the devices and the kernels",
        description="Shows how hope_ext was built, the devices here, and the CUDA kernels.",
    )
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    print("build")
    for name, value in hope_ext.build_info().items():
        if isinstance(value, dict):  # flags: one line per compiler
            for compiler, flags in value.items():
                print(f"  {name} {compiler}: {flags}")
        else:
            print(f"  {name:<13} {', '.join(value) if isinstance(value, list) else value}")
    print("devices")
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"  cpu           {torch.get_num_threads()} threads, {capability}")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        print(f"  cuda:{index}        {gpu.name}, {memory}, sm_{gpu.major}{gpu.minor}")
    print(f"  auto          {choose_device('auto')}")
    kernels = hope_ext.kernel_report()
    spilling = [kernel for kernel in kernels if kernel["spill_bytes"]]
    print(f"CUDA kernels    {len(kernels)} in the build, {len(spilling)} that spill registers")
    for kernel in spilling:
        print(f"  {kernel['name']} ({kernel['architecture']}): {kernel['spill_bytes']} bytes")
    return 0
