"""GET /v1/octavo/blocks, and the shares that it and `octavo status --blocks` show."""

import pytest
from octavo.gateway.block_report import block_report
from octavo.proto import admin_pb2


def test_each_group_is_told(gateway):
    status = gateway.engine.status
    for group_id in (0, 1):
        group = status.groups.add(group_id=group_id, state=admin_pb2.GROUP_STATE_READY, block_size=16, num_blocks=100)
        group.num_free_blocks = 60
        group.blocks.num_used, group.blocks.num_table_entries, group.blocks.num_empty_places = 40, 50, 24
        group.block_counters.num_looked_up_tokens, group.block_counters.num_device_hit_tokens = 100, 25
    answer = gateway.http.get("/v1/octavo/blocks").json()
    assert (answer["object"], answer["model"]) == ("octavo.blocks", "tiny")
    assert [group["group_id"] for group in answer["groups"]] == [0, 1]
    first = answer["groups"][0]
    assert (first["state"], first["num_blocks"], first["num_used"], first["num_free"]) == ("ready", 100, 40, 60)
    assert (first["fragmentation"], first["saved_by_sharing"], first["device_hit_rate"]) == (0.03, 0.2, 0.25)


def test_without_the_coordinator(start_gateway, loop):
    with start_gateway() as own:
        loop.run(own.engine_server.stop(0))
        response = own.http.get("/v1/octavo/blocks")
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "service_unavailable_error"


def test_shares():
    group = admin_pb2.GroupStatus(block_size=8)
    group.blocks.num_used, group.blocks.num_table_entries, group.blocks.num_empty_places = 30, 40, 32
    counters = group.block_counters
    counters.num_looked_up_tokens, counters.num_device_hit_tokens, counters.num_host_hit_tokens = 200, 50, 20
    counters.sum_used, counters.sum_table_entries, counters.sum_empty_places = 500, 1000, 160
    report = block_report(group)
    assert (report.fragmentation, report.saved_by_sharing) == (32 / 320, 0.25)
    assert (report.mean_fragmentation, report.mean_saved_by_sharing) == (160 / 8000, 0.5)
    assert (report.device_hit_rate, report.host_hit_rate) == (0.25, 0.1)


@pytest.mark.parametrize("num_used", [0, 3])
def test_shares_of_nothing_are_0(num_used):
    group = admin_pb2.GroupStatus(block_size=8)
    group.blocks.num_used = num_used  # on their way to the host, say
    report = block_report(group)
    assert (report.fragmentation, report.saved_by_sharing, report.device_hit_rate) == (0, 0, 0)
    group.blocks.num_table_entries = 2
    assert block_report(group).saved_by_sharing == (1 if num_used == 0 else 0)
