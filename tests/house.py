"""The house as a graph: modules, and rooms, which are the packages' folders and the files at their top.

python -m tests.house    # rooms, floors, arrows and circles
"""

import grimp
import networkx

PACKAGES = ("curated_data", "lightning_modules", "recipes")


def modules() -> networkx.DiGraph:
    """An arrow from each module to each that it imports, be it in a function; not those for type checkers."""
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True, cache_dir=None)
    found = networkx.DiGraph()
    for module in graph.modules:
        found.add_node(module)
        found.add_edges_from((module, other) for other in graph.find_modules_directly_imported_by(module))
    found.remove_nodes_from([name for name in PACKAGES if name in found])  # lazy public names
    return found


def rooms(graph: networkx.DiGraph) -> networkx.DiGraph:
    """The arrows between rooms: `curated_data.pool.tar` is in the room `curated_data.pool`."""

    def room(module: str) -> str:
        return ".".join(module.split(".")[:2])

    found = networkx.DiGraph()
    found.add_nodes_from(map(room, graph))
    found.add_edges_from((room(a), room(b)) for a, b in graph.edges if room(a) != room(b))
    return found


def circles(graph: networkx.DiGraph) -> list[list[str]]:
    """Groups of modules that import each other."""
    return [sorted(found) for found in networkx.strongly_connected_components(graph) if len(found) > 1]


def n_floors(graph: networkx.DiGraph) -> int:
    """How many rooms the longest way down passes; a circle is one room."""
    return networkx.dag_longest_path_length(networkx.condensation(graph)) + 1


def main() -> None:
    for name, graph in (("modules", modules()), ("rooms", rooms(modules()))):
        print(f"{name}: {len(graph)}, floors: {n_floors(graph)}, arrows: {graph.number_of_edges()}")
        print(f"  circles: {circles(graph) or 'none'}")


if __name__ == "__main__":
    main()
