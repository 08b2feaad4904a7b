"""What a solution may not change: make_starter.py writes it down, and the starter's own tests hold a solution to it."""

import ast


def outline(source):
    """The names a file defines, functions with their arguments, and which of them begin their body on the line of its `def`."""
    named = {}
    for node in ast.parse(source).body:
        for part in (node, *(node.body if isinstance(node, ast.ClassDef) else ())):
            if isinstance(part, (ast.FunctionDef, ast.ClassDef)):
                named[part.name] = ast.unparse(part.args) if isinstance(part, ast.FunctionDef) else "a class"
                named[part.name] += "; one line" * (part.body[0].lineno == part.lineno)
    return named
