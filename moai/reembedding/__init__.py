"""Re-embedding a law database: versions side by side, only what changed, safe against a crash at any moment.

from moai.reembedding.build import build
from moai.reembedding.options import ReembedConfig

report = build(ReembedConfig(db="data/lawfirm_v2.db", chunking_strategy="dynamic", version_id=5))
"""
