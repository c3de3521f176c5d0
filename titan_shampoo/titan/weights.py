"""Names and order of a model's weights in other programs."""

from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter

from titan_shampoo.config.errors import ConfigError, nearest
from titan_shampoo.titan.recipes import TRANSFORMERS


def weights_adapter(name: str | None, flavor: str | None) -> Llama3StateDictAdapter | None:
    """Torchtitan's adapter to Hugging Face's weights; None if their names are the same.

    Args:
        name: ``model.name``.
        flavor: ``model.flavor``.

    Raises:
        ConfigError: If there is no such flavour.
    """
    if name != "llama3":
        return None
    if flavor is None or flavor not in TRANSFORMERS:
        hint = nearest(str(flavor), TRANSFORMERS) or f"; there are: {', '.join(TRANSFORMERS)}"
        raise ConfigError(f'model.flavor = "{flavor}": llama3 has no such flavour{hint}')
    return Llama3StateDictAdapter(TRANSFORMERS[flavor], None)
