"""What the README and the example configuration say is true."""

import re
from pathlib import Path

import yaml

from relay import config
from tests.pictures import README, with_pictures

EXAMPLE = Path(__file__).parent.parent / "config.example.yaml"


def test_the_pictures_of_the_states_are_the_tables_of_moves():
    text = README.read_text("utf-8")
    assert text == with_pictures(text)


def test_the_example_configuration_loads_and_shows_every_key():
    names = re.findall(r"\$\{(\w+)\}", re.sub(r"#.*", "", EXAMPLE.read_text("utf-8")))
    environment = {name: f"the-{name}" for name in names}
    settings = config.load_config(EXAMPLE, environment)
    document = yaml.safe_load(EXAMPLE.read_text("utf-8"))
    assert set(document) == set(config.Settings.model_fields)
    sections = {
        "delivery": config.DeliverySettings,
        "network": config.NetworkSettings,
        "retention": config.RetentionSettings,
        "metrics": config.MetricsSettings,
        "tracing": config.TracingSettings,
    }
    for name, model in sections.items():
        assert set(document[name]) == set(model.model_fields)
        # What it shows is the default.
        assert getattr(settings, name) == model()
    assert set(document["accounts"]["luma"]) == set(config.AccountSettings.model_fields)
