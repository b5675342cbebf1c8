"""What the reports of tests say of servers. Nothing here knows pytest: `harness.run_report` brings it there."""
