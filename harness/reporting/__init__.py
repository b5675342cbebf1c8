"""What people see of servers: sections in the reports of tests, leaks, summaries, progress lines, logs as they are written.

Nothing here knows pytest: `harness.run_report` brings it there.
"""
