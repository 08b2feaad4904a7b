"""What a solution may not change. A starter holds the outline of its files, and its tests compare a solution with that."""

import ast


def outline(source):
    """The names that a file defines: functions with their arguments, and whether their body shares the line of `def`."""
    names = {}
    for node in ast.parse(source).body:
        for part in (node, *(node.body if isinstance(node, ast.ClassDef) else ())):
            if isinstance(part, (ast.FunctionDef, ast.ClassDef)):
                names[part.name] = ast.unparse(part.args) if isinstance(part, ast.FunctionDef) else "a class"
                names[part.name] += "; one line" * (part.body[0].lineno == part.lineno)
    return names
