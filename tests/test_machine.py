import torch

from companion import host, machine


def test_the_environment_stamp_is_plain_data():
    import json

    stamp = machine.environment()
    assert json.loads(json.dumps(stamp)) == stamp
    assert stamp["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in stamp["versions"]["torch"]
    assert stamp["cores"] == host.usable_cores()
