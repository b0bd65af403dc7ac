// Only the name of the type: nothing computes with it.
#pragma once

struct __nv_bfloat16 {};
