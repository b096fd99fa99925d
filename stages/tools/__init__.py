"""Language models that call tools: the language of calls, the tools a file describes, and how what a model wrote is carried out.

calls        the text of a plan <-> its calls
toolbox      tools.toml -> tools, each a checkpoint that is asked one of its tasks
controller   a model's plans, call by call, against the toolbox
"""
