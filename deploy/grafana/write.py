"""Writes the dashboards beside it: `python deploy/grafana/write.py`. A panel is a line here; Grafana's JSON has forty for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DASHBOARDS: dict[str, tuple[str, str, list[tuple[str, str, dict[str, str]]]]] = {
    "training": (
        "label_values(dlopt_train_steps_total, run)",
        "run",
        [
            ("Loss", "short", {'dlopt_train_loss{run=~"$run"}': "{{run}}"}),
            ("Validation", "short", {'dlopt_train_metric{run=~"$run", split="validation"}': "{{run}} {{metric}}"}),
            ("Rows a second", "short", {'dlopt_train_rows_per_second{run=~"$run"}': "{{run}}"}),
            ("Workers", "short", {'dlopt_train_workers{run=~"$run"}': "{{run}}"}),
            ("Learning rate", "sci", {'dlopt_train_learning_rate{run=~"$run"}': "{{run}}"}),
            ("Norm of the gradient", "short", {'dlopt_train_gradient_norm{run=~"$run"}': "{{run}}"}),
            ("Seconds of a step", "s", {'dlopt_train_step_seconds{run=~"$run"}': "{{run}}"}),
            ("Share of time that waits for rows", "percentunit", {'dlopt_train_data_wait_ratio{run=~"$run"}': "{{run}}"}),
            (
                "Seconds stood for checkpoints",
                "s",
                {'increase(dlopt_train_checkpoint_seconds_total{run=~"$run"}[5m])': "{{run}}"},
            ),
            (
                "Workers lost, and ways back",
                "short",
                {
                    'increase(dlopt_train_restarts_total{run=~"$run"}[15m])': "{{run}} restarts",
                    'increase(dlopt_train_rollbacks_total{run=~"$run"}[15m])': "{{run}} rollbacks",
                },
            ),
            ("Seconds since the last step", "s", {'time() - dlopt_train_last_step_timestamp_seconds{run=~"$run"}': "{{run}}"}),
            ("Epoch", "short", {'dlopt_train_epoch{run=~"$run"}': "{{run}}"}),
        ],
    ),
    "cluster": (
        "label_values(ray_node_cpu_count, instance)",
        "node",
        [
            ("Nodes that answer", "short", {'sum(up{job="ray", instance=~"$node"})': "nodes"}),
            ("CPU", "percent", {'ray_node_cpu_utilization{instance=~"$node"}': "{{instance}}"}),
            (
                "Memory",
                "percentunit",
                {'ray_node_mem_used_host{instance=~"$node"} / ray_node_mem_total_host': "{{instance}}"},
            ),
            ("Disk that is free", "bytes", {'ray_node_disk_free{instance=~"$node"}': "{{instance}}"}),
            ("Objects by place", "bytes", {'sum by (Location) (ray_object_store_memory{instance=~"$node"})': "{{Location}}"}),
            ("Tasks by state", "short", {"sum by (State) (ray_tasks)": "{{State}}"}),
            ("Actors by state", "short", {"sum by (State) (ray_actors)": "{{State}}"}),
            ("CPUs in use, of Ray's", "short", {'sum by (State) (ray_resources{Name="CPU"})': "{{State}}"}),
            (
                "Network",
                "Bps",
                {
                    'ray_node_network_receive_speed{instance=~"$node"}': "{{instance}} in",
                    'ray_node_network_send_speed{instance=~"$node"}': "{{instance}} out",
                },
            ),
            ("GPUs", "percent", {'ray_node_gpus_utilization{instance=~"$node"}': "{{instance}} {{GpuIndex}}"}),
        ],
    ),
    "data": (
        "label_values(ray_data_output_rows, dataset)",
        "dataset",
        [
            ("Rows", "short", {'sum by (dataset, operator) (ray_data_output_rows{dataset=~"$dataset"})': "{{operator}}"}),
            ("Bytes", "bytes", {'sum by (dataset, operator) (ray_data_output_bytes{dataset=~"$dataset"})': "{{operator}}"}),
            ("CPUs in use", "short", {'sum by (dataset, operator) (ray_data_cpu_usage_cores{dataset=~"$dataset"})': "{{operator}}"}),
            ("Tasks that run", "short", {'sum by (dataset, operator) (ray_data_num_tasks_running{dataset=~"$dataset"})': "{{operator}}"}),
            ("Tasks that failed", "short", {'sum by (dataset, operator) (ray_data_num_tasks_failed{dataset=~"$dataset"})': "{{operator}}"}),
            ("Bytes that spilled", "bytes", {'sum by (dataset) (ray_data_spilled_bytes{dataset=~"$dataset"})': "{{dataset}}"}),
        ],
    ),
}
"""Name to: what its variable takes its values from, the variable, and panels of (title, unit, {query: legend})."""


def dashboard(name: str) -> dict[str, Any]:
    """As Grafana imports it."""
    source, variable, panels = DASHBOARDS[name]
    prometheus = {"type": "prometheus", "uid": "prometheus"}
    chosen = {
        "name": variable,
        "type": "query",
        "datasource": prometheus,
        "query": {"query": source, "refId": "A"},
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
    }
    return {
        "uid": f"dlopt-{name}",
        "title": f"dlopt: {name}",
        "schemaVersion": 41,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [chosen]},
        "panels": [
            {
                "id": place + 1,
                "type": "timeseries",
                "title": title,
                "datasource": prometheus,
                "gridPos": {"x": 12 * (place % 2), "y": 8 * (place // 2), "w": 12, "h": 8},
                "fieldConfig": {"defaults": {"unit": unit, "custom": {"fillOpacity": 5}}, "overrides": []},
                "targets": [
                    {"refId": chr(65 + index), "datasource": prometheus, "expr": query, "legendFormat": legend}
                    for index, (query, legend) in enumerate(queries.items())
                ],
            }
            for place, (title, unit, queries) in enumerate(panels)
        ],
    }


def text(name: str) -> str:
    return json.dumps(dashboard(name), indent=1) + "\n"


if __name__ == "__main__":
    for name in DASHBOARDS:
        (Path(__file__).parent / "dashboards" / f"{name}.json").write_text(text(name))
