"""Plugins, hooks, platforms: how STAR gets in, and SGLang on a plain CPU."""

from __future__ import annotations

from typing import Final

from sglang_star.engine.contract.row import Attribute, Class, Function, Module, Name, Row

_PLUGINS: Final = "sglang.srt.plugins"
_REGISTRY: Final = "sglang.srt.plugins.hook_registry"
_PLATFORMS: Final = "sglang.srt.platforms"
_CHOICES: Final = "sglang.srt.arg_groups.choices"
_CPU: Final = "platform.cpu"

ROWS: Final[tuple[Row, ...]] = (
    # Plugins.
    Name(
        _PLUGINS + ".GENERAL_PLUGINS_GROUP",
        "our entry point's group",
        "plugin",
        value="sglang.srt.plugins",
    ),
    Name(
        _PLUGINS + ".PLATFORM_PLUGINS_GROUP",
        "our platform's group",
        "platform",
        value="sglang.srt.platforms",
    ),
    Function(_PLUGINS + ".load_plugins", "called before a fork", "platform.preloaded"),
    Function(
        _REGISTRY + ".HookRegistry.register",
        "every hook",
        "hooks",
        takes="target, hook, hook_type",
    ),
    Function(_REGISTRY + ".HookRegistry.apply_hooks", "every hook", "hooks"),
    Class(_REGISTRY + ".HookType", "kinds of hooks, by value", "hooks"),
    Attribute(_REGISTRY + ".HookType.BEFORE", "may change arguments", "hooks", value="before"),
    Attribute(_REGISTRY + ".HookType.AFTER", "gets the result first", "hooks", value="after"),
    Attribute(_REGISTRY + ".HookType.AROUND", "gets the function first", "hooks", value="around"),
    Attribute(_REGISTRY + ".HookType.REPLACE", "one class for another", "hooks", value="replace"),
    # Platforms.
    Name(_PLATFORMS + ".current_platform", "whether it is ours", "launch plugin"),
    Class(_PLATFORMS + ".cpu.CpuDeviceMixin", "a CPU as a device", _CPU),
    Class(_PLATFORMS + ".interface.SRTPlatform", "what a platform answers", _CPU),
    Function(
        _PLATFORMS + ".interface.SRTPlatform.get_default_attention_backend",
        "overridden: plain torch",
        _CPU,
    ),
    Function(
        _PLATFORMS + ".interface.SRTPlatform.get_dispatch_key_name",
        "overridden: operators in plain torch",
        _CPU,
    ),
    Function(
        _PLATFORMS + ".interface.SRTPlatform.is_pin_memory_available",
        "overridden: there is no device",
        _CPU,
        takes="device",
    ),
    Attribute(_PLATFORMS + ".interface.SRTPlatform.capabilities", "overridden: it has none", _CPU),
    Function(
        _PLATFORMS + ".interface.PlatformCapabilities", "a platform without any is made of it", _CPU
    ),
    Attribute(_PLATFORMS + ".device_mixin.DeviceMixin._enum", "overridden: not SGLang's own", _CPU),
    Attribute(
        _PLATFORMS + ".device_mixin.PlatformEnum.OOT", "a platform that is not SGLang's own", _CPU
    ),
    # Attention over plain torch may be deterministic.
    Name(_CHOICES + ".DETERMINISTIC_ATTENTION_BACKEND_CHOICES", "who may", "launch"),
    Name(
        _CHOICES + ".RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND",
        "who may keep the prefix cache then",
        "launch",
    ),
    Name(_CHOICES + ".add_deterministic_attention_backend_choices", "adds ours", "launch"),
    Name(
        _CHOICES + ".add_radix_supported_deterministic_attention_backend_choices",
        "adds ours",
        "launch",
    ),
    # NIXL.
    Module("nixl._api", "imported before a fork", "platform.nixl_host platform.preloaded"),
    Name("nixl._api.nixlBind", "NIXL's compiled part: its configuration", "platform.nixl_host"),
)
