"""`fastbb bench`: measures backbones, and other ways to run them.

command        the command: what to do, what to print, which files to write
run            what was asked for, and the three kinds of bench
measure        a cell: its ways, each in a process, in turns
processes      worker processes, seen from the one that asks; worker: the process itself
timing         times of calls
subject        what can be measured, and the truth about its result
backbones, ways            a backbone, and the ways to run it
hosts, host_models         models of other libraries, for `accelerate`
stages, end_to_end         an extraction stage by stage: measured, in words
launches, traffic          bytes and launches on a GPU, counted; counts: multiply-adds
results        the data, as the JSON file has it; environment: the machine
noise, compare             intervals; two benches
table, markdown, exports   results as text and files
plot, waterfall, traffic_plot, pictures    pictures
"""
