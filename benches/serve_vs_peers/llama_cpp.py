"""llama.cpp's server by way of xllamacpp, which needs nothing built. Requests choose LoRAs by their place in --loras.

Repacked buffers are off unless asked for: they have crashed on models of this kind.
"""

import argparse
import threading

import xllamacpp


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, default=512, help="of each slot")
    parser.add_argument("--loras", nargs="*", default=[])
    parser.add_argument("--repack", action="store_true")
    args = parser.parse_args()

    params = xllamacpp.CommonParams()
    params.model.path = args.model
    params.n_parallel, params.n_ctx = args.slots, args.slots * args.context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    params.no_extra_bufts = not args.repack
    params.cache_ram_mib = 0
    params.verbosity = 0
    params.lora_init_without_apply = True
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in args.loras]
    server = xllamacpp.Server(params)
    print(f"listening on {server.listening_address}", flush=True)
    threading.Event().wait()


main()
