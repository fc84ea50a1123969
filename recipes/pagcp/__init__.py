"""PAGCP (arXiv 2303.11923): whole channels go, as many of each group as every task's tolerance allows."""
