"""Plan for fifteen minutes of a GPU: correctness first, then times, then counters.

    python -m bench.device first [second | third] --out FOLDER      # on the GPU's machine: plan.py says what each does
    python -m bench.device first second --dry                       # anywhere: compile its kernels, emulate some of it
    python -m bench.device.prepare                                  # anywhere: .gpu/, kernels compiled beforehand

plan.py is the table of what runs when, and what runs it, in processes of their own. part.py is such a process: it does
the jobs of one part, which the other files list, and writes a line of JSON at the end of each (session.py). So nothing
is lost where a limit is hit, where a kernel takes the CUDA context along, or where the machine goes away.
"""
