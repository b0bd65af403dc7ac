// Only the name of the type: nothing computes with it.
#pragma once

struct __half {};
